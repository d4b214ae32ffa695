"""The caller's floating-point environment: it holds in every thread of a step, and is left alone.

Worker threads are born with the environment that their creator has then. So every test here makes
the workers first, in a thread of its own, and changes the environment after.
"""
from __future__ import annotations

import ctypes
import platform
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest

import optcore
from optcore.runtime import always_threaded

MACHINE = sys.platform, platform.machine()
UPWARD, DOWNWARD, TOWARD_ZERO, OVERFLOW, ALL = {
    "x86_64": (0x800, 0x400, 0xC00, 0x08, 0x3D),
    "AMD64": (0x800, 0x400, 0xC00, 0x08, 0x3D),
    "aarch64": (0x400000, 0x800000, 0xC00000, 0x04, 0x1F),
    "arm64": (0x400000, 0x800000, 0xC00000, 0x04, 0x1F),
}.get(MACHINE[1], (0,) * 5)
# Where fenv_t keeps the word with the bits that flush subnormals to zero, and these bits
FLUSH = {("linux", "x86_64"): (28, 0x8040), ("linux", "aarch64"): (0, 1 << 24)}
# Drawn while nothing is flushed
TINY = (np.random.default_rng(5).standard_normal((2, 70_000)) * 1e-38).astype(np.float32)
MODES = {"flush": None, "upward": UPWARD, "downward": DOWNWARD, "toward zero": TOWARD_ZERO}

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not ALL, reason="knows <fenv.h> not")


@pytest.fixture(scope="module")
def libm():
    return ctypes.CDLL(None)


@contextmanager
def environment(libm, mode):
    before, changed = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    libm.fegetenv(before)
    try:
        if MODES[mode] is not None:
            assert libm.fesetround(MODES[mode]) == 0
        else:
            at, bits = FLUSH[MACHINE]
            libm.fegetenv(changed)
            word = int.from_bytes(changed.raw[at:at + 4], "little") | bits
            changed[at:at + 4] = word.to_bytes(4, "little")
            libm.fesetenv(changed)
        yield
    finally:
        libm.fesetenv(before)


def in_new_thread(body):
    result = []
    thread = threading.Thread(target=lambda: result.append(body()))
    thread.start()
    thread.join()
    return result[0]


def stepped(threads, max_norm=None):
    """Bits of parameters, velocity and norm after three steps on tiny numbers."""
    x, g = TINY.copy()
    optcore.set_num_threads(threads)
    try:
        with always_threaded(1000):
            opt = optcore.SGD(x, lr=0.3, momentum=0.9, max_norm=max_norm)
            for _ in range(3):
                opt.step(g)
    finally:
        optcore.set_num_threads(None)
    velocity = opt.state_dict()["state"][0]["velocity"]
    return x.tobytes(), velocity.tobytes(), None if max_norm is None else opt.grad_norm.hex()


@pytest.mark.parametrize("max_norm", [None, 5e-7], ids=["plain", "norm"])
@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_the_threads(libm, mode, max_norm):
    if mode == "flush" and MACHINE not in FLUSH:
        pytest.skip("knows not how to flush here")
    usual = stepped(1, max_norm)
    with environment(libm, mode):
        alone = stepped(1, max_norm)
    assert alone[0] != usual[0]
    for threads in (2, 3, 7):
        def body(threads=threads):
            before = stepped(threads, max_norm)
            with environment(libm, mode):
                within = stepped(threads, max_norm)
            return before, within, stepped(threads, max_norm)

        assert in_new_thread(body) == (usual, alone, usual), threads


def test_flush_denormal_of_torch():
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush subnormals")

    def body():
        stepped(2)
        torch.set_flush_denormal(True)
        try:
            return stepped(2), stepped(1)
        finally:
            torch.set_flush_denormal(False)

    two, one = in_new_thread(body)
    assert two == one


def test_workers_keep_their_own(libm):
    """What another user of OpenMP has set in its workers, which are ours too, is still there."""
    if not optcore.show_config("dicts")["compiler"].startswith("GCC"):
        pytest.skip("asks the workers through libgomp")
    libgomp = ctypes.CDLL("libgomp.so.1")
    caller = None

    def in_workers(call):
        seen = []

        def work(_):
            if threading.get_ident() != caller:
                seen.append(call())

        libgomp.GOMP_parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work), None, 3, 0)
        return seen

    def body():
        nonlocal caller
        caller = threading.get_ident()
        usual = stepped(3)
        assert in_workers(libm.fegetround) == [0, 0]
        with environment(libm, "downward"):
            stepped(3)
        assert in_workers(libm.fegetround) == [0, 0]
        in_workers(lambda: libm.fesetround(UPWARD))
        assert stepped(3) == usual
        assert in_workers(libm.fegetround) == [UPWARD, UPWARD]
        assert libm.fegetround() == 0
        return True

    assert in_new_thread(body)


@pytest.mark.parametrize("at", [0, -1], ids=["caller's share", "worker's share"])
def test_exception_flags_are_those_of_one_thread(libm, at):
    x, g = np.ones((2, 70_000), np.float32)
    g[at] = 3e38

    def flag(lr, threads):
        optcore.set_num_threads(threads)
        libm.feclearexcept(ALL)
        optcore.sgd_step(x.copy(), g, lr=lr)
        return libm.fetestexcept(OVERFLOW)

    with always_threaded(1000):
        for threads in (1, 2, 7):
            assert flag(1.0, threads) == 0
            assert flag(10.0, threads) == OVERFLOW, threads
    libm.feclearexcept(ALL)
    optcore.set_num_threads(None)
