"""Run the app of digits_flower.py on this machine, and hold it against plain NumPy.

A SuperLink, a SuperNode for each client and what these start are processes that speak over
loopback. Afterwards this process trains all clients in turn and takes the server's steps as one
writes them in NumPy: both must end with the same bits.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

# One thread each, for there are many processes; nothing is told to anybody. Before NumPy is loaded.
os.environ.update({
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
})
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from digits import digits
from digits_flower import network, train

import optcore

HERE = Path(__file__).parent
HOST = "127.0.0.1"
LR, MOMENTUM, CLIENT_LR = 0.7, 0.9, 0.1

Part = tuple[np.ndarray, np.ndarray]


def alone(parts: list[Part], rounds: int) -> list[np.ndarray]:
    """Return the parameters after the same rounds in this process, without Flower's help."""
    params = network().params
    velocities = [np.zeros_like(p) for p in params]
    counts = [len(x) for x, _ in parts]
    shares = [np.float32(n / sum(counts)) for n in counts]
    for round_number in range(1, rounds + 1):
        models = [network() for _ in parts]
        for k, model in enumerate(models):
            for mine, p in zip(model.params, params, strict=True):
                mine[...] = p
            train(model, *parts[k], lr=CLIENT_LR, seed=(round_number, k))
        for i, (x, v) in enumerate(zip(params, velocities, strict=True)):
            mean = shares[0] * models[0].params[i]
            for share, model in zip(shares[1:], models[1:], strict=True):
                mean = mean + share * model.params[i]
            d = x - mean
            v *= np.float32(MOMENTUM)
            v += d
            x -= np.float32(LR) * (d + np.float32(MOMENTUM) * v)
    return params


def free_ports(n: int) -> list[int]:
    """Return ports that nobody listens to just now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server((HOST, 0))) for _ in range(n)]
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running(folder: Path, name: str, *arguments: object) -> Iterator[None]:
    """Have a program of Flower's run meanwhile; it ends with all that it has started."""
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            list(map(str, arguments)), cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, how)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)


def await_superlink(port: int, until: float) -> None:
    """Return once it answers."""
    while True:
        try:
            urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def federated(folder: Path, parts: list[Part], rounds: int, seconds: float) -> Path:
    """Run the app in a folder, where everything of it stays; return its checkpoint."""
    until = time.monotonic() + seconds
    os.environ["FLWR_HOME"] = str(folder)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    app, checkpoint = folder / "app", folder / "checkpoint.safetensors"
    app.mkdir()
    for source in (HERE / "pyproject.toml", HERE / "digits_flower.py", HERE.parent / "digits.py"):
        shutil.copy(source, app)        # an app is what lies in its folder
    superlink, *ports = free_ports(1 + len(parts))
    (folder / "config.toml").write_text(
        f'[superlink.loopback]\naddress = "{HOST}:{superlink}"\ninsecure = true\n'
    )
    settings = {"rounds": rounds, "clients": len(parts), "lr": LR, "momentum": MOMENTUM,
                "client-lr": CLIENT_LR, "checkpoint": f'"{checkpoint}"'}
    with contextlib.ExitStack() as processes:
        processes.enter_context(running(
            folder, "superlink", "flower-superlink", "--insecure", "--host", HOST,
            "--port", superlink, "--disable-runtime-dependency-installation",
        ))
        await_superlink(superlink, until)
        for k, (port, (x, labels)) in enumerate(zip(ports, parts, strict=True)):
            np.savez(folder / f"{k}.npz", x=x, labels=labels)
            processes.enter_context(running(
                folder, f"supernode-{k}", "flower-supernode", "--insecure",
                "--superlink", f"{HOST}:{superlink}", "--host", HOST, "--port", port,
                "--node-config", f'partition-id={k} images="{folder / f"{k}.npz"}"',
            ))
        subprocess.run(
            ["flwr", "run", str(app), "loopback", "--stream", "--run-config",
             " ".join(f"{name}={value}" for name, value in settings.items())],
            check=True, timeout=until - time.monotonic(),
        )
    return checkpoint


def main() -> int:
    """Run both and compare; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--least-accuracy", type=float, default=0.9)
    parser.add_argument("--seconds", type=float, default=300, help="give up after so many")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # not before the others have ended
    x, labels, x_test, labels_test = digits(seed=0)
    ends = [len(x) * k**2 // args.clients**2 for k in range(1, args.clients)]    # not all alike
    parts = list(zip(np.split(x, ends), np.split(labels, ends), strict=True))
    model = network()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            checkpoint = federated(folder, parts, args.rounds, args.seconds)
            named = {str(i): p for i, p in enumerate(model.params)}
            optcore.SGD.load(checkpoint, [{"params": named}])
        except (OSError, subprocess.SubprocessError) as error:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}", log.read_text()[-3000:], sep="\n")
            print(f"loopback: {error}")
            return 1
    equal = all(p.tobytes() == q.tobytes()
                for p, q in zip(model.params, alone(parts, args.rounds), strict=True))
    accuracy = model.accuracy(x_test, labels_test)
    print(f"accuracy {accuracy:.2%}; {'the same bits' if equal else 'OTHER BITS'} as NumPy's")
    return int(not equal or accuracy < args.least_accuracy)


if __name__ == "__main__":
    sys.exit(main())
