"""optcore.flower against its twin in NumPy and Flower's own strategies; a run of processes."""
from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from test_precision import made
from twin import Twin

import optcore
from optcore.checkpoint import CheckpointError
from reference import same_bits

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
if os.environ.get("OPTCORE_REQUIRE_FLOWER") != "1":
    pytest.importorskip("flwr", reason="needs Flower")

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import FedAvg, FedAvgM
from flwr.supercore.task_identity import TaskIdentity

from optcore.flower import ServerSGD

# Whose messages these are, which Flower's own processes say
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

COUNTS = [3, 1, 6]      # examples of each client


class Clients:
    """A grid whose clients answer at once, in `order`, with what `answer` makes of a round."""

    def __init__(self, answer, order=(0, 1, 2)):
        self.answer, self.order, self.rounds = answer, order, []

    def get_node_ids(self):
        return [1 + k for k in range(len(self.order))]

    def send_and_receive(self, messages, *, timeout=None):
        messages = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        if not messages:
            return []
        self.rounds.append(messages[0].content["config"]["server-round"])
        return [reply(messages[k], self.answer(self.rounds[-1], k), k) for k in self.order]


def reply(message, arrays, k):
    record = arrays if isinstance(arrays, ArrayRecord) else record_of(arrays)
    metrics = MetricRecord({"num-examples": COUNTS[k], "part": k, "loss": float(k)})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)


def record_of(arrays):
    return ArrayRecord({name: Array(a) for name, a in arrays.items()})


def model(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": np.asarray(rng.standard_normal((300, 7)), dtype),
        "bn.running_var": np.asarray(rng.random(5), dtype),
        "bn.num_batches": np.array(seed, np.int64),
        "scale": np.array(rng.standard_normal(), dtype),
        "none": np.zeros(0, dtype),
        "turned": np.asfortranarray(rng.standard_normal((4, 6)), dtype),
    }


def answer(round_number, k):
    return model(10 * round_number + k)


def trained(strategy, rounds=3, grid=None, start=None):
    start = record_of(model(0)) if start is None else start
    return strategy.start(grid or Clients(answer), start, num_rounds=rounds).arrays


def numbers(record):
    return {name: array.numpy() for name, array in record.items()}


def assert_same(record, other):
    assert list(record) == list(other)
    for name, array in record.items():
        assert same_bits(array.numpy(), other[name].numpy()), name
        assert array.dtype == other[name].dtype


@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9}, {"lr": 0.7, "momentum": 0.9, "nesterov": True, "ema_decay": 0.9},
    {"lr": lambda step: 0.5 / (1 + step), "weight_decay": 0.01,
     "track_grad_norm": True},
    {"momentum": 0.5, "lr_in_velocity": True, "clip_value": 0.1, "velocity_dtype": "bfloat16"},
])
def test_rounds_follow_the_twin(options, cases):
    strategy = ServerSGD(averaged=["*.running_*"], fraction_evaluate=0.0, **options)
    grid = Clients(answer)
    arrays, twin = record_of(model(0)), None
    for round_number in range(1, 5):
        messages = strategy.configure_train(round_number, arrays, ConfigRecord(), grid)
        twin = twin or Twin(strategy.opt)
        arrays, metrics = strategy.aggregate_train(round_number, grid.send_and_receive(messages))
        sets = [answer(round_number, k) for k in range(3)]
        names = ["conv.weight", "scale", "none", "turned", "bn.running_var", "bn.num_batches"]
        twin.outer_step([[np.float64(s[name]) if name == "bn.num_batches" else s[name]
                          for name in names] for s in sets], COUNTS)
        twin.check()
        for name, p in zip(names[:-1], twin.params, strict=False):
            cases(same_bits(arrays[name].numpy(), p), name)
        # (3 * 10r + 1 * (10r + 1) + 6 * (10r + 2)) / 10
        assert same_bits(arrays["bn.num_batches"].numpy(), np.array(10 * round_number + 1))
        assert metrics["loss"] == pytest.approx(1.3)
    assert strategy.rounds == 4
    if "ema_decay" in options:
        assert list(strategy.ema) == list(arrays)
        assert same_bits(strategy.ema["turned"].numpy(), twin.averages[3])


@pytest.mark.parametrize(("theirs", "ours"), [
    (FedAvg(fraction_evaluate=0.0), {}),
    (FedAvgM(server_learning_rate=0.7, server_momentum=0.9, fraction_evaluate=0.0),
     {"lr": 0.7, "momentum": 0.9}),
])
def test_agrees_with_flowers_own(theirs, ours):
    def floats(round_number, k):
        return {name: a for name, a in answer(round_number, k).items() if a.dtype.kind == "f"}

    start = record_of(floats(0, 0))
    a, b = (numbers(trained(strategy, 5, Clients(floats), start)) for strategy in
            (theirs, ServerSGD(fraction_evaluate=0.0, **ours)))
    assert list(a) == list(b)
    for name, array in a.items():
        assert array.dtype == b[name].dtype
        np.testing.assert_allclose(b[name], array, rtol=0, atol=3e-6, err_msg=name)


def test_a_round_needs_less_memory_than_flowers():
    """At its peak, the clients' arrays aside: the record that is sent out, and little besides."""
    n = 1 << 20
    sent = [ArrayRecord({"w": Array(np.full(n, 1.0 + k, np.float32))}) for k in range(3)]
    peaks = []
    for strategy in (FedAvgM(server_momentum=0.9, fraction_evaluate=0.0),
                     ServerSGD(momentum=0.9, fraction_evaluate=0.0)):
        grid = Clients(lambda round_number, k: sent[k])
        arrays = sent[0]
        for round_number in range(1, 4):
            messages = list(strategy.configure_train(round_number, arrays, ConfigRecord(), grid))
            replies = grid.send_and_receive(messages)
            if round_number == 3:
                tracemalloc.start()
            arrays, _ = strategy.aggregate_train(round_number, replies)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4 * n + 100_000
    assert peaks[1] < peaks[0] / 2


def test_what_clients_send_is_not_copied():
    from optcore.flower import _views

    record = record_of({"w": np.arange(5.0), "t": np.asfortranarray(np.ones((2, 3), np.float32))})
    for name, view in _views(record).items():
        assert same_bits(view, record[name].numpy())
        data = np.frombuffer(record[name].data, np.uint8)
        assert np.shares_memory(view, data)
        assert not view.flags.writeable


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_models(name):
    dtype = np.float16 if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    values = np.linspace(-1, 1, 500, dtype=np.float32)
    record = record_of({"w": values.astype(dtype)})
    strategy = ServerSGD(0.5, momentum=0.9, fraction_evaluate=0.0)
    clients = Clients(lambda round_number, k: {"w": (values * (k + round_number)).astype(dtype)})
    p = made(values, name)
    opt = optcore.SGD([p], lr=0.5, momentum=0.9)
    for round_number in (1, 2):
        opt.outer_step([[made(values * np.float32(k + round_number), name)] for k in range(3)],
                       weights=COUNTS)
    sent = trained(strategy, 2, clients, record)["w"]
    assert sent.dtype == name
    assert sent.numpy().dtype == record["w"].numpy().dtype
    assert sent.numpy().tobytes() == p.tobytes()


def test_order_of_arrival():
    """With an order the same bits whoever comes first; else sums round otherwise."""
    for ordered_by, alike in (("part", True), (None, False)):
        a, b = (
            trained(ServerSGD(momentum=0.9, ordered_by=ordered_by, fraction_evaluate=0.0),
                    grid=Clients(answer, order))
            for order in ([0, 1, 2], [2, 0, 1])
        )
        assert same_bits(a["conv.weight"].numpy(), b["conv.weight"].numpy()) == alike


def test_resumed_run_has_the_same_bits(tmp_path):
    options = {"lr": lambda step: 1 / (1 + step), "momentum": 0.9, "nesterov": True,
               "averaged": ["bn.*"], "fraction_evaluate": 0.0}
    whole = trained(ServerSGD(**options), 4)
    trained(ServerSGD(checkpoint=tmp_path / "run", **options), 2)
    strategy = ServerSGD(**options)
    arrays = strategy.restore(tmp_path / "run", record_of(model(7)))
    assert strategy.rounds == 2
    grid = Clients(answer)
    assert_same(trained(strategy, 2, grid, arrays), whole)
    assert grid.rounds == [3, 4]
    with pytest.raises(CheckpointError, match="does not fit"):
        strategy.restore(tmp_path / "run", record_of({"other": np.ones(3, np.float32)}))
    assert strategy.rounds == 4


def test_goes_on_from_whatever_is_sent_out():
    """As where noise is added to what a strategy returns before the next round."""
    strategy = ServerSGD(0.5, momentum=0.9, fraction_evaluate=0.0)
    trained(strategy, 1)
    velocity = strategy.opt.state_dict()["state"][0]["velocity"]
    other = model(99)
    strategy.configure_train(2, record_of(other), ConfigRecord(), Clients(answer))
    held = {name: p for group in strategy.opt.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)}
    assert all(same_bits(held[name], a.astype(held[name].dtype)) for name, a in other.items())
    assert same_bits(strategy.opt.state_dict()["state"][0]["velocity"], velocity)
    for wrong in ({**other, "scale": np.ones(2, np.float32)}, {"scale": other["scale"]},
                  {**other, "more": np.ones(2)}):
        with pytest.raises(ValueError, match=r"array '.*' must be .*, as it began, got "):
            strategy.configure_train(3, record_of(wrong), ConfigRecord(), Clients(answer))
    assert all(same_bits(held[name], a.astype(held[name].dtype)) for name, a in other.items())


def test_a_round_without_answers_and_one_that_is_skipped():
    strategy = ServerSGD(momentum=0.9, skip_nonfinite=True, fraction_evaluate=0.0)
    grid, start = Clients(answer), record_of(model(0))
    messages = list(strategy.configure_train(1, start, ConfigRecord(), grid))
    failed = [Message(Error(1, "gone"), reply_to=message) for message in messages]
    assert strategy.aggregate_train(1, failed) == (None, None)
    assert strategy.aggregate_train(1, []) == (None, None)
    assert strategy.rounds == 0
    bad = Clients(lambda r, k: {**answer(r, k), "scale": np.array(np.nan, np.float32)})
    arrays, _ = strategy.aggregate_train(1, bad.send_and_receive(messages))
    assert_same(arrays, start)
    assert (strategy.opt.skipped, strategy.rounds) == (1, 1)


@pytest.mark.parametrize(("answers", "error", "words"), [
    (lambda k: {**model(k), "scale": np.ones(2, np.float32)}, ValueError,
     r"replica_params\[0\].*has shape \(2,\)"),
    (lambda k: {"scale": np.ones((), np.float32)}, (KeyError, ValueError), "conv.weight"),
    (lambda k: {**model(k), "scale": np.ones((), np.complex64)}, TypeError, "complex64"),
    (lambda k: ArrayRecord({"scale": Array("float32", (), "zip", b"")}), TypeError,
     "must be serialized as 'numpy.ndarray', got 'zip'"),
])
def test_refused_answers_change_nothing(answers, error, words):
    strategy = ServerSGD(momentum=0.9, fraction_evaluate=0.0)
    arrays = trained(strategy, 1)
    grid = Clients(lambda round_number, k: answers(k))
    messages = list(strategy.configure_train(2, arrays, ConfigRecord(), grid))
    before = strategy.opt.state_dict()["state"][0]["velocity"]
    with pytest.raises(error, match=words):
        strategy.aggregate_train(2, grid.send_and_receive(messages))
    assert strategy.rounds == 1
    assert same_bits(strategy.opt.state_dict()["state"][0]["velocity"], before)


def test_refusals():
    with pytest.raises(ValueError, match="momentum must be"):
        ServerSGD(momentum=2.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'grads'"):
        ServerSGD(grads=[np.ones(3)])
    with pytest.raises(TypeError, match="averaged must be several names"):
        ServerSGD(averaged="bn.*")
    strategy = ServerSGD(ordered_by="rank", fraction_evaluate=0.0)
    with pytest.raises(RuntimeError, match="nothing to write before the first round"):
        strategy.save("nowhere")
    with pytest.raises(RuntimeError, match="configure_train"):
        strategy.aggregate_train(1, [])
    with pytest.raises(ValueError, match="ordered_by must name a metric of every client"):
        trained(strategy)
    assert strategy.rounds == 0
    strategy = ServerSGD(max_norm=1.0, fraction_evaluate=0.0)
    with pytest.raises(ValueError, match=r"max_norm must be None where .* 'bn.num_batches' is"):
        trained(strategy)
    assert strategy.opt is None
    trained(strategy, start=record_of({"w": np.ones(3)}), grid=Clients(lambda r, k: {
        "w": np.full(3, r + k + 0.5)}))
    assert strategy.opt.grad_norm > 0


def test_without_flower_the_import_says_what_to_install():
    code = "import sys; sys.modules['flwr'] = None; import optcore.flower"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=False)
    assert "ImportError: optcore.flower needs Flower" in done.stderr
    assert "pip install 'optcore[flower]'" in done.stderr


def test_the_example_runs_as_processes(federation):
    """A SuperLink and two SuperNodes on loopback; the global model has the bits of plain NumPy."""
    assert "Received 2 results and 0 failures" in federation
    assert "the same bits as NumPy's" in federation
