"""The benchmarks compute what they claim to, and the report says what was measured."""
from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

bench = Path(__file__).parents[1] / "bench"
if not bench.is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)

import apart  # noqa: E402
import cases  # noqa: E402
import contenders  # noqa: E402
import limit  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import resident  # noqa: E402
import shapes  # noqa: E402
import tables  # noqa: E402
import training  # noqa: E402
from samples import KEPT, Sample, thinned  # noqa: E402
from targets import FAR, FIELD, FUSED, TARGETS, Target  # noqa: E402

import reference  # noqa: E402

SMALL = "70000"         # more than one period of the data
MACHINE = {
    "CPU": "a CPU", "cores": 2, "caches": "L1 32KB", "NumPy": "2.0", "optcore": "0.1",
    "date": "2020-01-01",
}


def row(contender, *us, repeat=0, job="sgd", workload="1e6", threads=1, **more):
    return {
        "job": job, "workload": workload, "dtype": "float32", "threads": threads,
        "repeat": repeat, "contender": contender, "n_bytes": 12_000_000, "us": list(us), **more,
    }


@pytest.fixture
def small_models(monkeypatch):
    """A model of a few tensors, one of them 2-d, in the place of the real ones."""
    monkeypatch.setitem(shapes.MODELS, "small", [(3, 5), (1,), (70_000,)])
    return "small"


def test_shapes_are_those_of_the_architectures():
    assert shapes.MODELS["ResNet-50"][0] == (64, 3, 7, 7)
    assert shapes.MODELS["GPT-2 small"][2:4] == [(768,), (768,)]
    assert len(shapes.MODELS["GPT-2 small"]) == 148


def test_a_wrong_shape_is_noticed(monkeypatch):
    monkeypatch.setitem(shapes._MODELS, "MLP", (shapes.many_small, 6, 1_863_690))
    with pytest.raises(AssertionError, match="MLP"):
        shapes.checked("MLP")


def check(contender, case):
    arrays = (tables.Table if case.touched else cases.Arrays)(case)
    arrays.reset()
    with contender.at_level():
        arrays.check(contender.build(case, arrays), exact=contender.exact)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("job", cases.RULES)
@pytest.mark.parametrize("contender", contenders.ENGINE, ids=lambda c: c.name)
def test_engine_equals_the_reference(contender, job, dtype):
    case = cases.Case(job, SMALL, dtype)
    if contender.takes(case):
        check(contender, case)


@pytest.mark.parametrize("job", [*cases.RULES, cases.PIPELINE])
@pytest.mark.parametrize(
    "contender", [*contenders.NUMPY, *contenders.OPTCORE, contenders.OPTCORE_ALONE],
    ids=lambda c: c.name,
)
def test_models_equal_the_reference(contender, job, small_models):
    case = cases.Case(job, small_models)
    if contender.takes(case):
        check(contender, case)


@pytest.mark.parametrize("storage", cases.STORAGES)
@pytest.mark.parametrize("job", ["momentum", "sgd"])
def test_storages_equal_the_reference(job, storage):
    check(contenders.OPTCORE[0], cases.Case(job, SMALL, storage=storage))


def test_a_count_that_stands_still_is_noticed(monkeypatch):
    case = cases.Case("adam", SMALL)
    arrays = cases.Arrays(case)
    arrays.reset()
    monkeypatch.setattr(contenders, "count", lambda first: iter([first] * 2))
    for build in (contenders.build_function, contenders.build_literal, contenders.build_out):
        arrays.reset()
        with pytest.raises(AssertionError, match="tensor 0"):
            arrays.check(build(case, arrays), exact=False)


def test_bytes_of_rules():
    found = {job: cases.Case(job, SMALL).bytes_each for job in cases.ADAPTIVE}
    assert found == {"adagrad": 20, "rmsprop": 20, "adam": 28, "adamw": 28}
    assert cases.Case("adam", SMALL, "float64").bytes_each == 56


def test_bytes_of_storages():
    found = [cases.Case("momentum", SMALL, storage=name).bytes_each for name in cases.STORAGES]
    assert found == [20, 16, 14, 18, 14, 22, 10, 10, 22, 14]
    found = [cases.Case("sgd", SMALL, storage=name).bytes_each for name in cases.STORAGES]
    assert found == [12, 12, 10, 10, 10, 14, 6, 6, 14, 6]
    assert cases.Case("pipeline", SMALL, "float64").bytes_each == 72


OUTERS = [*contenders.OUTERS, contenders.NUMPY_OUTER, *peers.with_torch(peers.OUTERS)]


@pytest.mark.parametrize("outer", cases.OUTERS)
@pytest.mark.parametrize("contender", OUTERS, ids=lambda c: c.name)
def test_outer_steps_equal_the_reference(contender, outer, small_models):
    case = cases.Case(cases.OUTER, small_models, threads=2, outer=outer)
    assert contender.takes(case)
    check(contender, case)


@pytest.mark.parametrize(("stepped", "word"), [
    ("1 replica, written back", "replica 0 is not written"),     # as one that does not write
    ("4 replicas", "tensor 0"),                                  # as if there were fewer
])
def test_the_check_of_outer_steps_notices(stepped, word):
    case = cases.Case(cases.OUTER, SMALL, outer=stepped)
    arrays = cases.Arrays(case)
    arrays.reset()
    opt = case.optimizer(arrays.x)
    run = cases.Run(lambda: opt.outer_step(arrays.sets[:3]), lambda: arrays.x)
    with pytest.raises(AssertionError, match=word):
        arrays.check(run, exact=True)


def test_weights_of_replicas_are_told_from_none():
    case = cases.Case(cases.OUTER, SMALL, outer="4 replicas")
    plain = contenders.build_outer(case, arrays := cases.Arrays(case))
    weighted = contenders.build_outer_weighted(case, arrays)
    assert not np.allclose(plain.expected, weighted.expected, rtol=0, atol=1e-4)


def test_bytes_of_outer_steps():
    found = [cases.Case(cases.OUTER, SMALL, outer=name).bytes_each for name in cases.OUTERS]
    assert found == [20, 24, 32, 48, 56, 96]


def test_what_an_outer_step_takes_beyond_its_arrays():
    if not resident.CLEAR.exists():
        pytest.skip("the system does not say how much is resident")
    case = cases.Case(cases.OUTER, "1e6", threads=2, outer="4 replicas, written back")
    ours = resident.apart(case, contenders.build_outer)
    assert ours < 1e6
    # Flower's mean, its differences, two of momentum's and the new parameters: 4 MB each
    assert resident.apart(case, contenders.build_flower) > ours + 8e6


IN_ROWS = [
    *contenders.OPTCORE_ROWS[:2], contenders.OPTCORE_DENSE, *contenders.NUMPY_ROWS,
    *peers.with_torch(peers.IN_ROWS),
]


def rows_case(touched, workload="3000"):        # more than one period of the data
    return cases.Case(cases.ROWS, workload, touched=touched)


@pytest.mark.parametrize("touched", ["10 rows, uniform", "1,000 rows, Zipf"])
@pytest.mark.parametrize("contender", IN_ROWS, ids=lambda c: c.name)
def test_steps_on_rows_equal_the_reference(contender, touched):
    check(contender, rows_case(touched))


def test_who_is_measured_on_rows():
    large = rows_case("10 rows, Zipf", "1e7")
    everyone = [*contenders.OPTCORE_ROWS, contenders.OPTCORE_DENSE, *contenders.NUMPY_ROWS]
    dense, small = contenders.ROWS_DENSE, contenders.ROWS_SMALL
    names = {c.name for c in everyone}
    assert {c.name for c in everyone if c.takes(large)} == names - {dense}
    assert {c.name for c in everyone if c.takes(replace(large, workload="1e5"))} == names - {small}
    assert not contenders.OPTCORE_DENSE.takes(cases.Case("momentum", "1e6"))


def test_the_check_of_rows_notices():
    case = rows_case("1,000 rows, Zipf")
    table = tables.Table(case)

    def other(build=contenders.build_rows, **more):
        return replace(build(case, table), **more)

    def two_in_one():
        run = contenders.build_rows(case, table)
        return replace(run, step=lambda: (run.step(), table.x[0][-1:].__iadd__(1)))

    for build, exact in [
        (lambda: other(lambda *both: contenders.build_rows(*both, lazy="rows"), expected=None), 0),
        (lambda: other(expected=table.after_two(lazy=True)), False),
        (lambda: other(expected=table.after_two("sgd")), False),
        (lambda: other(params=lambda: table.x), False),     # what is not touched stays behind
        (two_in_one, False),
        (lambda: other(expected=np.nextafter(table.expected, np.float32(9))), True),
    ]:
        table.reset()
        with pytest.raises(AssertionError, match=r"row \d+ is not"):
            table.check(build(), exact=exact)


@pytest.mark.parametrize("touched", cases.TOUCHED)
def test_rows_are_drawn_as_they_are_called(touched):
    n = 1000
    table = tables.Table(rows_case(touched, str(n)))
    drawn = np.concatenate(table.indices)
    assert drawn.shape == (tables.ROTATION,)
    assert len(table.values) == len(table.indices[0]) == cases.TOUCHED[touched].n
    counts = np.sort(np.bincount(drawn, minlength=n))[::-1] / drawn.size
    rank = np.arange(1, n + 1)
    shares = np.log1p(1 / rank) / np.log(n + 1) if "Zipf" in touched else 1 / n
    assert counts.all()                                 # no two ranks meet
    assert np.allclose(counts[:10], np.broadcast_to(shares, n)[:10], rtol=0.3)
    assert not np.array_equal(table.indices[0], table.indices[1])
    assert rows_case(touched).n_bytes == 20 * 64 * cases.TOUCHED[touched].n


def test_the_check_of_noise_reaches_the_last_element_and_the_seed(monkeypatch):
    case = cases.Case("momentum", SMALL, storage=cases.HALF)
    nearest = replace(case, storage=f"{cases.HALF}, to the nearest")
    assert case.noisy
    assert not nearest.noisy
    arrays = cases.Arrays(case)
    for build in [
        lambda: contenders.build_step(nearest, arrays),
        lambda: replace(
            run := contenders.build_step(case, arrays),
            step=lambda: (run.step(), arrays.x[0][-1:].__iadd__(1)),
        ),
    ]:
        arrays.reset()
        with pytest.raises(AssertionError, match="tensor 0"):
            arrays.check(build(), exact=True)
    monkeypatch.setattr(cases, "SEED", 1)
    check(contenders.OPTCORE[0], case)
    arrays.reset()
    run = contenders.build_step(case, arrays)
    monkeypatch.setattr(cases, "SEED", 0)
    with pytest.raises(AssertionError, match="tensor 0"):
        arrays.check(run, exact=True)


def test_float32_beside_a_storage_has_arrays_of_its_own():
    case = cases.Case("momentum", SMALL, storage=cases.HALF)
    arrays = cases.Arrays(case)
    arrays.reset()
    run = contenders.build_wide(case, arrays)
    cases.Arrays(replace(case, storage=None)).check(run, exact=True)
    assert reference.same_bits(arrays.x[0][:3], arrays.pattern["x"][:3])


def test_what_leaves_elements_unstepped_is_found_wrong(monkeypatch):
    halves = [c for c in peers.installed() if c.name in peers.HALVES[:2]]
    if not halves:
        pytest.skip("PyTorch is not here")

    def build(case, arrays):
        run = halves[0].build(case, arrays)

        def step():
            before = arrays.x[0][:8].copy()
            run.step()
            arrays.x[0][:8] = before

        return replace(run, step=step)

    lazy = contenders.Contender(peers.HALVES[2], build)
    monkeypatch.setattr(peers, "installed", lambda: [*halves, lazy])
    assert peers.wrong() == [lazy.name]


COMPILING = ("JAX + optax, donated", "Numba, fastmath", peers.COMPILED, peers.DEEPSPEED)


@pytest.mark.parametrize(
    "contender", [c for c in peers.installed() if c.name not in COMPILING], ids=lambda c: c.name
)
def test_peers_that_need_no_compiling_are_close(contender, small_models):
    for job in ("sgd", "pipeline", "adam"):
        case = cases.Case(job, small_models)
        if contender.takes(case):
            check(contender, case)


def test_the_check_notices_a_wrong_step():
    case = cases.Case("momentum", SMALL)
    arrays = cases.Arrays(case)
    arrays.reset()
    wrong = contenders.build_out(cases.Case("nesterov", SMALL), arrays)
    with pytest.raises(AssertionError, match="tensor 0"):
        arrays.check(wrong, exact=False)


def test_a_missing_peer_is_named_as_absent(monkeypatch, tmp_path):
    monkeypatch.setitem(peers.MODULES, "BLAS", ["no_such_module_as_this"])
    assert peers.absent()["BLAS"] == ["no_such_module_as_this"]
    assert "BLAS saxpy" not in [contender.name for contender in peers.installed()]
    summary = {
        "suite": "peers", "quick": True, "machine": MACHINE, "rows": [row(contenders.STEP, 1)],
        "peers": {}, "absent": peers.absent(),
    }
    text = report.document(summary, report.Results(summary["rows"]))
    assert "Absent: BLAS, for want of no_such_module_as_this." in text


@pytest.fixture
def deepspeed(monkeypatch):
    """What stands for DeepSpeed; as its Adam, PyTorch's."""
    torch = pytest.importorskip("torch")
    modules = {name: ModuleType(name) for name in (
        "deepspeed", "deepspeed.ops", "deepspeed.ops.adam", "deepspeed.ops.op_builder",
    )}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["deepspeed.ops.op_builder"].CPUAdamBuilder = lambda: SimpleNamespace(load=lambda: None)
    modules["deepspeed.ops.adam"].DeepSpeedCPUAdam = (
        lambda params, adamw_mode, **options: (adamw_mode or torch.optim.Adam)(params, **options)
    )
    peers.unbuilt.cache_clear()
    yield modules["deepspeed.ops.op_builder"]
    peers.unbuilt.cache_clear()


def test_deepspeed_is_measured_where_it_builds(deepspeed, small_models):
    assert "DeepSpeed" not in peers.absent()
    (contender,) = [c for c in peers.installed() if c.name == peers.DEEPSPEED]
    case = cases.Case("adam", small_models, threads=2)
    assert contender.takes(case)
    assert not contender.takes(replace(case, job="momentum"))
    check(contender, case)


def test_deepspeed_is_absent_where_it_does_not_build(deepspeed):
    def load():
        raise RuntimeError("no ninja")

    deepspeed.CPUAdamBuilder = lambda: SimpleNamespace(load=load)
    assert peers.absent()["DeepSpeed"] == ["a build of its CPU Adam"]
    assert peers.DEEPSPEED not in [contender.name for contender in peers.installed()]


def test_what_has_no_compiler_is_named_as_absent_and_skipped(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-cc")
    monkeypatch.setenv("CXX", "no-such-cxx")
    absent = peers.absent()
    assert absent[contenders.LIMIT] == ["a C compiler"]
    assert absent[peers.COMPILED] == ["a C++ compiler"]
    case = cases.Case("momentum", "1e6")
    with pytest.raises(limit.NoCompilerError, match="no-such-cc"):
        limit.limit_contender(tmp_path).build(case, None)
    with pytest.raises(limit.NoCompilerError, match="no-such-cxx"):
        peers.build_compiled(case, None)
    with pytest.raises(limit.NoCompilerError, match="no-such-cc"):
        training.round_trip(tmp_path)


def test_a_contender_in_a_process_of_its_own():
    case = cases.Case("momentum", "1000")
    run = apart.build_apart(case, None, build=contenders.build_step)
    assert run.calls > 1                    # a step takes a microsecond, a request ten thousand
    run.step()
    assert apart.apart(case, contenders.build_step).step == run.step    # one for all repeats


def build_another_rule(case, arrays):
    return contenders.build_out(cases.Case("nesterov", case.workload), arrays)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [(build_another_rule, AssertionError, "tensor 0"), (None, RuntimeError, "NoneType")],
)
def test_errors_of_another_process_are_raised_here(build, error, match):
    with pytest.raises(error, match=match):
        apart.build_apart(cases.Case("momentum", "1000"), None, build=build)


def test_compiled_steps_are_few():
    (compiled,) = [
        c for group in peers._CANDIDATES.values() for c in group if c.name == peers.COMPILED
    ]
    taken = [
        (job, workload) for job in [*cases.RULES, cases.PIPELINE]
        for workload in [*shapes.MODELS, "1e3", "1e6", "5e7"]
        if compiled.takes(cases.Case(job, workload, threads=2))
    ]
    assert len(taken) == 6
    assert ("momentum", "ResNet-50") in taken
    assert not compiled.checked             # here; its own process does


@pytest.fixture
def small_training(monkeypatch):
    """A network of a few units in the place of the real ones."""
    sizes = 7, 5, 4, training.CLASSES
    monkeypatch.setitem(shapes.TRAININGS, "small", (sizes, 16))
    monkeypatch.setitem(shapes.MODELS, "small", list(shapes.dense(*sizes)))
    return "small"


def train(contender, case):
    net = training.Training(case)
    net.reset()
    it = contender.build(case, net)
    for _ in range(training.WARM_UP_STEPS + training.TIMED_STEPS):
        net.backward()
        it.step()
    return net


@pytest.mark.parametrize("job", ["sgd", "momentum"])
@pytest.mark.parametrize(
    "contender",
    [*contenders.NUMPY, *contenders.OPTCORE[:1], *[
        c for c in peers.installed() if c.name == FUSED
    ]], ids=lambda c: c.name,
)
def test_trainings_end_with_the_same_parameters(contender, job, small_training):
    case = cases.Case(job, small_training, threads=2)
    assert contender.takes(case)            # threads beside the step make a run of their own
    train(contender, case).check_trained(exact=contender.name != FUSED)


def test_a_training_that_went_another_way_is_noticed(small_training):
    net = train(contenders.NUMPY[0], cases.Case("momentum", small_training))
    with pytest.raises(AssertionError, match="tensor 0"):
        training.Training(cases.Case("momentum", small_training)).check_trained(exact=False)
    net.x[2][0, 0] = np.nextafter(net.x[2][0, 0], 9)
    net.check_trained(exact=False)
    with pytest.raises(AssertionError, match="tensor 2"):
        net.check_trained(exact=True)


def test_a_backward_pass_is_the_gradient_of_the_loss(small_training):
    net = training.Training(cases.Case("sgd", small_training, "float64"))
    net.reset()
    for x in net.x:
        x += 0.1        # away from units that are at 0 exactly, where there is no slope
    net.backward()
    images, labels = net._images[: net.batch], net._labels[: net.batch]

    def loss():
        z = images
        for i, (weights, bias) in enumerate(zip(net.x[::2], net.x[1::2], strict=True)):
            z = (np.maximum(z, 0) if i else z) @ weights + bias
        return np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels])

    for x, g in zip(net.x, net.g, strict=True):
        at = np.unravel_index(np.abs(g).argmax(), g.shape)
        middle, slopes = x[at], []
        for step in (1e-6, -1e-6):
            x[at] = middle + step
            slopes.append(loss())
        x[at] = middle
        assert (slopes[0] - slopes[1]) / 2e-6 == pytest.approx(g[at], rel=1e-5, abs=0)


def test_round_trip(tmp_path):
    try:
        nanoseconds = training.round_trip(tmp_path)
    except limit.NoCompilerError as reason:
        pytest.skip(str(reason))
    assert nanoseconds is None or nanoseconds > 1


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tmp_path_factory.mktemp("limit")     # compiled once


# From 0.5, and gradients, replicas and velocities of 0.5; the pipeline zeroes the gradients
TWO_LIMIT_STEPS = {
    "sgd": (0.45, 0.4), "momentum": (0.405, 0.2695), "pipeline": (0.405, 0.3195),
    "adam": (0.489391, 0.478778),
    "outer": (0.2165, 0.338405), "outer, written back": (0.2165, -0.03865),
}


@pytest.mark.parametrize(("job", "dtype", "storage"), [
    *[(job, dtype, None) for job in ("sgd", "momentum", "pipeline", "adam")
      for dtype in ("float32", "float64")],
    *[(job, "float32", storage) for job in ("sgd", "momentum") for storage in cases.STORAGES],
])
def test_the_limit_sweeps_every_element(job, dtype, storage, built):
    case = cases.Case(job, "600003", dtype, threads=2, storage=storage)
    try:
        run = limit.limit_contender(built).build(case, None)
    except limit.NoCompilerError as reason:
        pytest.skip(str(reason))
    assert run.calls == 1
    (x,) = run.params()
    assert x.size == 600_003
    for stepped in TWO_LIMIT_STEPS[job]:
        run.step()
        assert (x == x[0]).all()        # every element the same step
        value = float(reference.widened(x[:1].view(cases.dtype_of(case.stored.param)))[0])
        assert value == pytest.approx(stepped, rel=0, abs=2**-8 if storage else 1e-6)
    assert x.ctypes.data % 64 == 0


def test_the_limit_of_adam_keeps_both_averages(built):
    n = 600_003
    try:
        run = limit.limit_contender(built).build(cases.Case("adam", str(n)), None)
    except limit.NoCompilerError as reason:
        pytest.skip(str(reason))
    memory, _ = run.close()
    cells = np.frombuffer(memory, np.float32)
    _, g, m, v = np.flatnonzero(cells == 0.5).reshape(4, n)
    cells[g] = 1
    run.step()
    assert (cells[g] == 1).all()
    assert np.allclose(cells[m], 0.55, rtol=0, atol=1e-6)
    assert np.allclose(cells[v], 0.5005, rtol=0, atol=1e-6)


@pytest.mark.parametrize("outer", cases.OUTERS)
def test_the_limit_of_outer_steps(outer, built):
    case = cases.Case(cases.OUTER, "600003", threads=2, outer=outer)
    try:
        run = limit.limit_contender(built).build(case, None)
    except limit.NoCompilerError as reason:
        pytest.skip(str(reason))
    (x,) = run.params()
    for stepped in TWO_LIMIT_STEPS["outer, written back" if "back" in outer else "outer"]:
        run.step()
        assert (x == x[0]).all()
        assert x[0] == pytest.approx(stepped, rel=0, abs=1e-6)


@pytest.mark.parametrize("touched", cases.TOUCHED)
def test_the_limit_of_rows(touched, built):
    case = cases.Case(cases.ROWS, "3000", threads=2, touched=touched)
    table = tables.Table(case)
    try:
        run = limit.rows_limit_contender(built).build(case, table)
    except limit.NoCompilerError as reason:
        pytest.skip(str(reason))
    run.step()
    (x,) = run.params()
    dense, v, want = np.full((3, *x.shape), 0.5)        # rows are wanted as of their last step
    for indices in table.indices[: run.calls]:
        rows = list(dict.fromkeys(indices))             # each once, as it comes first
        v *= 0.9
        v[rows] += table.values[: len(rows)]
        dense -= 0.1 * v
        want[rows] = dense[rows]
    assert np.allclose(x, want, rtol=0, atol=1e-3)
    for _ in range(run.warm_up):
        run.step()                                      # all sets, and the first again
    assert run.warm_up * run.calls == len(table.indices)


def test_rows_leave_the_rounds_out():
    raw = {"benchmarks": [{
        "extra_info": {**row("it"), "calls": 10}, "stats": {"data": [7e-5, 5e-5]},
    }, {
        "extra_info": {"round_trip": 60}, "stats": {"data": [1]},      # trained something else
    }]}
    assert report.rows_of(raw) == [row("it", 5.0, 7.0)]


def test_rounds_are_thinned_evenly():
    assert thinned([3, 1, 2]) == [1, 2, 3]
    assert thinned(reversed(range(9 * 100))) == [50 + 100 * i for i in range(KEPT)]


def test_quartiles():
    sample = Sample.of([5, 1, 2, 4, 3])
    assert (sample.low, sample.median, sample.high) == (2, 3, 4)
    assert report.figure(sample) == "3.00 (2.00–4.00)"
    assert report.figure(sample, times=True) == "3.00× (2.00–4.00)"
    assert report.figure(None) == "–"


ONE_MODE = {
    "normal": lambda rng, n: rng.normal(1, 0.1, n),
    "uniform": lambda rng, n: rng.uniform(0.8, 1.2, n),
    "tail": lambda rng, n: 1 + rng.exponential(0.2, n),
    "equal": lambda rng, n: np.ones(n),
    "one outlier": lambda rng, n: np.r_[np.full(n - 1, 1.0), 9.0],
}


@pytest.mark.parametrize("n", [1, 18, 27, 54])
@pytest.mark.parametrize("draw", ONE_MODE.values(), ids=ONE_MODE)
def test_one_mode_is_not_flagged(draw, n):
    rng = np.random.default_rng(5)
    flagged = sum(Sample.of(draw(rng, n)).bimodal for _ in range(100))
    assert flagged <= 5


@pytest.mark.parametrize("n", [9, 27, 54])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_two_modes_are_flagged(share, n):
    rng = np.random.default_rng(5)
    second = round(share * n)
    flagged = 0
    for _ in range(100):
        near, far = rng.normal(340, 8, n - second), rng.normal(2280, 40, second)
        flagged += Sample.of([*near, *far]).bimodal
    assert flagged >= 95
    assert "†" in report.figure(Sample.of([340.0] * (n - second) + [2280.0] * second))


def test_modes_that_hardly_differ_are_one():
    assert not Sample.of([100, 100, 100, 105, 105, 105]).bimodal
    assert Sample.of([100, 100, 100, 115, 115, 115]).bimodal


def test_ratios_are_taken_repeat_by_repeat():
    # The machine was half as fast in the second repeat; the ratio is 2 in both.
    results = report.Results([
        row("a", 10), row("b", 20), row("a", 20, repeat=1), row("b", 40, repeat=1),
    ])
    key = ("sgd", "1e6", "float32", 1)
    ratio = results.speedup(key, "a", "b")
    assert (ratio.low, ratio.median, ratio.high) == (2, 2, 2)
    assert results.time(key, "a").median == 15
    assert results.bandwidth(key, "a").median == pytest.approx(900)
    assert results.speedup(key, "a", "absent") is None


def test_a_ratio_compares_every_round_with_every_round():
    results = report.Results([row("a", 1, 2), row("b", 4, 8)])
    assert results.speedup(("sgd", "1e6", "float32", 1), "a", "b").values == (2, 4, 4, 8)


def test_a_target_is_judged_by_its_closest_opponent():
    results = report.Results([row("a", 10), row("b", 20), row("c", 15)])
    target = Target("peers", "sgd", "1e6", "a", ("b", "c", "absent"), 1.6)
    ratio, name = results.judge(target)
    assert (ratio.median, name) == (1.5, "c")
    assert results.judge(Target("peers", "sgd", "1e9", "a", ("b",), 1.6)) is None


@pytest.mark.parametrize(
    ("theirs", "verdict"), [((8, 9, 9.5), "**missed**"), ((8, 9, 10.5), "held")]
)
def test_within_the_spread_nobody_is_faster(theirs, verdict, monkeypatch):
    target = Target("peers", "sgd", "1e6", "a", ("b",), 1.0, within_spread=True)
    monkeypatch.setattr(report, "TARGETS", [target])
    results = report.Results([row("a", 9.8, 10, 10.2), row("b", *theirs)])
    assert results.judge(target)[0].median < 1
    text = report.target_table(results, "peers")
    assert "1.00× within the spread" in text
    assert f"{verdict} |" in text


def test_what_the_machine_decides_is_held_to_the_limit_and_the_field():
    for job, workload, who, threads in [
        ("sgd", "1e6", contenders.STEP, 1), ("sgd", "1e6", contenders.FUNCTION, 1),
        ("momentum", "ResNet-50", contenders.STEP, "all"),
    ]:
        mine = {
            (t.than, t.at_least, t.within_spread) for t in TARGETS
            if (t.suite, t.job, t.workload, t.who, t.threads)
            == ("peers", job, workload, who, threads)
        }
        assert {((contenders.LIMIT,), 0.95, False), (FIELD, 1.0, True)} <= mine
        assert (FUSED,) not in [than for than, *_ in mine]


def trained_rows(*round_trips):
    return [
        row(
            name, us * (5 if trip and trip > 100 else 1), repeat=repeat, job="momentum",
            workload="digits net in training", threads=2,
            **{"round_trip": trip} if trip else {},
        )
        for repeat, trip in enumerate(round_trips)
        for name, us in [
            (contenders.LITERAL, 700), (contenders.STEP, 300), (contenders.ALONE, 310),
        ]
    ]


def test_trainings_are_told_apart_by_how_far_the_cores_are():
    results = report.Results(trained_rows(60, 62, 350))
    lines = report.training_table(results).splitlines()[2:]
    assert len(lines) == 2
    assert "| 61.0 (60.0–62.0) | 700 (700–700) |" in lines[0]
    assert "| 350 (350–350) | 3,500 (3,500–3,500) |" in lines[1]
    (target,) = [t for t in TARGETS if t.who == contenders.STEP + FAR]
    ratio, _ = results.judge(target)
    assert ratio.median == pytest.approx(1 / 5)     # no repeat had both, and yet it is judged
    assert report.Results(trained_rows(60)).judge(target) is None
    key = (target.job, target.workload, "float32", 2)
    assert results.speedup(key, contenders.LITERAL + FAR, contenders.STEP) is None
    assert "Nowhere" in report.wins_of_peers(results)
    assert report.all_tables(results, "peers").count("| 2.33× (2.33–2.33) |") == 2


def test_the_short_table_shows_a_training_as_it_was():
    for trips, text in [((350,), "round trip 350 ns | 3,500"), ((60, 350), "round trip 60.0 ns"),
                        ((None,), "digits net in training, 2 threads | 700")]:
        assert text in report.short_table(report.Results(trained_rows(*trips)))


def test_targets_name_contenders_that_exist():
    ours = [*contenders.ENGINE, *contenders.OPTCORE, contenders.OPTCORE_ALONE]
    names = {contender.name for contender in ours} | {
        contenders.LIMIT, contenders.WIDE, *peers.NAMES,
        contenders.FLOWER, *[c.name for c in [*contenders.OUTERS, *peers.OUTERS]],
        *[c.name for c in [*contenders.OPTCORE_ROWS, contenders.OPTCORE_DENSE, *peers.IN_ROWS]],
    }
    variants = {"outer": cases.OUTERS, "rows": cases.TOUCHED}
    for target in TARGETS:
        assert {target.who.removesuffix(FAR), *target.than} <= names
        assert target.variant in variants.get(target.suite, cases.STORAGES)


@pytest.mark.parametrize("suite", ["engine", "peers"])
def test_report(suite, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        row(name, us * scale, workload=workload, job=job, threads=threads)
        for workload, scale in [("1e5", 1), ("1e6", 10)]
        for job in ("sgd", "momentum", "nesterov", "adagrad", "adam")
        for threads in ((1, 2) if suite == "peers" else (1,))
        for name, us in [
            (contenders.LITERAL, 20), (contenders.OUT, 16), (contenders.FUNCTION, 8.5),
            (contenders.STEP, 8), (contenders.LIMIT, 7.6),
        ]
    ]
    summary = {
        "suite": suite, "quick": False, "machine": MACHINE, "rows": rows, "peers": {},
        "absent": {},
    }
    documents = []
    for name in ("README.md", "docs.md"):
        documents.append(tmp_path / name)
        markers = {
            "README.md": ["bench"], "docs.md": ["engine", "peers"],
        }[name]
        documents[-1].write_text(
            "before\n" + "".join(f"<!-- {m}:begin -->\nold\n<!-- {m}:end -->\n" for m in markers)
        )
    report.write(summary, tmp_path, *documents)
    report.write(summary, tmp_path, *documents)      # nothing piles up
    text = (tmp_path / f"{suite}.md").read_text()
    assert "| optcore, step() | 80.0 (80.0–80.0) | 150 (150–150) |" in text
    assert "2.00×" in text
    assert "**Adam, 1,000,000, float32, 1 thread**" in text
    assert report.READING in text
    picture = tmp_path / ("engine.png" if suite == "engine" else "roofline.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    readme, docs = (document.read_text() for document in documents)
    assert readme.startswith("before\n")
    assert readme.count("old") == (suite == "engine")       # the README is the peers' suite's
    if suite == "peers":
        assert 4 <= readme.count("\n|") <= 11
    assert docs.startswith("before\n")
    assert docs.count("old") == 1           # the other suite's place is left alone
    assert "### Targets" in docs
    assert "All results" not in docs        # the full tables are in one place


def test_report_of_storages(tmp_path):
    rows = [
        row(name, us, job="momentum", workload="5e7", threads=2, storage=storage)
        for storage, times in [
            ("float32", {contenders.LIMIT: 8, contenders.STEP: 10}),
            ("bfloat16 velocity",
             {contenders.LIMIT: 6, contenders.STEP: 8, contenders.WIDE: 10}),
        ]
        for name, us in times.items()
    ]
    summary = {
        "suite": "storage", "quick": False, "machine": MACHINE, "rows": rows, "peers": {},
        "absent": {}, "wrong": [FUSED],
    }
    docs = tmp_path / "docs.md"
    docs.write_text("<!-- storage:begin -->\n<!-- storage:end -->\n")
    report.write(summary, tmp_path, docs=docs)
    for text in (docs.read_text(), (tmp_path / "storage.md").read_text()):
        assert f"Not measured: {FUSED}, whose" in text
        assert "| bfloat16 velocity | 16 | 8.00 (8.00–8.00) | 0.75 (0.75–0.75) | 1.25× (" in text
        assert "| float32 | 20 | 10.0 (10.0–10.0) | 0.80 (0.80–0.80) | – |" in text
        assert "momentum, 50,000,000, bfloat16 velocity | all |" in text
        assert text.count("| held |") == 1
    assert "**momentum, 50,000,000, bfloat16 velocity, 2 threads**" in text
    assert not list(tmp_path.glob("*.png"))


def test_report_of_outer_steps(tmp_path):
    in_place = peers.OUTERS[1].name
    rows = [
        row(name, us * scale, job="outer", workload="2.5e7", threads=threads, outer=outer)
        for outer, scale in [("1 replica", 1), ("4 replicas, written back", 3)]
        for threads in (1, 2)
        for name, us in {
            contenders.LIMIT: 7, contenders.OUTER_STEP: 10, contenders.OUTER_WEIGHTED: 11,
            contenders.FLOWER: 44, in_place: 16,
        }.items()
    ]
    summary = {
        "suite": "outer", "quick": False, "machine": MACHINE, "rows": rows, "peers": {},
        "absent": {}, "resident": [
            {"workload": "2.5e7", "outer": "1 replica", "contender": name, "mb": mb}
            for name, mb in [(contenders.OUTER_STEP, 0.25), (contenders.FLOWER, 500)]
        ],
    }
    docs = tmp_path / "docs.md"
    docs.write_text("<!-- outer:begin -->\n<!-- outer:end -->\n")
    report.write(summary, tmp_path, docs=docs)
    text = docs.read_text()
    assert (
        "| outer step, 25,000,000, 4 replicas, written back | all | optcore, outer_step(weights)"
        " | NumPy, as Flower | 3.00× | 4.00× (4.00–4.00) | held |"
    ) in text
    assert "memory limit | 0.90× | 0.70× (0.70–0.70) | **missed** |" in text
    assert f"1.60× (1.60–1.60), {in_place} | held |" in text
    assert "| 4 replicas, written back | 48 | 30.0 (30.0–30.0) | 0.70 (" in text
    assert "| 25,000,000, 1 replica | 0.25 | 500 |" in text
    assert "shall be below 1.00 and is at most 0.25: held" in text
    summary["resident"][0]["mb"] = 1.5
    assert "at most 1.50: **missed**" in report.resident_table(summary["resident"])
    assert "Not measured" in report.resident_table([])
    assert "Nowhere" in report.wins_of_peers(report.Results(rows), contenders.OUTER_STEP)


def test_report_of_rows(tmp_path):
    sparse = peers.IN_ROWS[0].name
    rows = [
        row(name, us * scale, job="rows", workload=workload, touched=touched)
        for workload, touched, scale in [
            ("1e6", "1,000 rows, uniform", 1), ("1e7", "10,000 rows, Zipf", 10),
        ]
        for name, us in {
            contenders.LIMIT: 100, contenders.ROWS_EXACT: 125, contenders.ROWS_SMALL: 75,
            contenders.ROWS_DENSE: 12_000, sparse: 400,
        }.items()
    ]
    summary = {
        "suite": "rows", "quick": False, "machine": MACHINE, "rows": rows, "peers": {},
        "absent": {},
    }
    docs = tmp_path / "docs.md"
    docs.write_text("<!-- rows:begin -->\n<!-- rows:end -->\n")
    report.write(summary, tmp_path, docs=docs)
    text = docs.read_text()
    for line in [
        f"| row by row, 1,000,000 × 64, 1,000 rows, uniform | 1 | {contenders.ROWS_EXACT} "
        f"| {contenders.ROWS_DENSE} | 100× | 96.0× (96.0–96.0) | **missed** |",
        f"{sparse} | 3.00× | 3.20× (3.20–3.20) | held |",
        f"{contenders.ROWS_SMALL} | 0.67× | 0.60× (0.60–0.60) | **missed** |",
        "**row by row, 1,000,000 × 64, 1 thread**",
        "| 10,000 rows, Zipf | 125 (125–125) | 1,250 (1,250–1,250) | 0.80 (0.80–0.80) | 0.60× (",
    ]:
        assert line in text
    assert "| memory limit | 100 (100–100) | 1,000 (" in (tmp_path / "rows.md").read_text()


@pytest.mark.parametrize("path", sorted(bench.glob("results/*.json")), ids=lambda path: path.stem)
def test_results_of_earlier_runs_can_be_reported(path):
    summary = json.loads(path.read_text())
    text = report.document(summary, report.Results(summary["rows"]))
    assert text.count("\n**") >= len({(r["job"], r["workload"]) for r in summary["rows"]})


def test_markers_must_be_there():
    with pytest.raises(ValueError, match="bench:begin"):
        report.between_markers("nothing", "bench", "x")


def test_json_goes_round():
    summary = {"suite": "engine", "machine": MACHINE, "rows": [row("a", 1.5), row("b", 2.5)]}
    assert json.loads(report.to_json(summary)) == summary
