"""The benchmarks compute what they claim to, and the report says what was measured."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

bench = Path(__file__).parents[1] / "bench"
if not bench.is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)

import cases  # noqa: E402
import contenders  # noqa: E402
import limit  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
from targets import TARGETS, Target  # noqa: E402

SMALL = "70000"         # more than one period of the data
MACHINE = {
    "CPU": "a CPU", "cores": 2, "caches": "L1 32KB", "NumPy": "2.0", "optcore": "0.1",
    "date": "2020-01-01",
}


def row(contender, us, *, repeat=0, job="sgd", workload="1e6", threads=1):
    return {
        "job": job, "workload": workload, "dtype": "float32", "threads": threads,
        "repeat": repeat, "contender": contender, "n_bytes": 12_000_000, "us": us,
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
    arrays = cases.Arrays(case)
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


@pytest.mark.parametrize(
    "contender", [c for c in peers.installed() if "JAX" not in c.name and "Numba" not in c.name],
    ids=lambda c: c.name,
)
def test_peers_that_need_no_compiling_are_close(contender, small_models):
    for job in ("sgd", "pipeline"):
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
    assert "Absent: the memory limit" in text


@pytest.mark.parametrize("job", ["sgd", "momentum", "pipeline"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_limit_sweeps_every_element(job, dtype, tmp_path):
    case = cases.Case(job, "1003", dtype)
    try:
        run = limit.limit_contender(tmp_path).build(case, None)
    except limit.NoCompilerError as reason:
        pytest.skip(str(reason))
    (x,) = run.params()
    assert x.size == 1003
    run.step()
    assert np.unique(x).size == 1       # every element the same steps
    assert x[0] != 0.5
    assert x.ctypes.data % 64 == 0


def test_rows_leave_the_rounds_out():
    raw = {"benchmarks": [{
        "extra_info": {**row("it", 0), "calls": 10}, "stats": {"median": 5e-5, "data": [1, 2]},
    }]}
    assert report.rows_of(raw) == [row("it", 5.0)]


def test_ratios_are_taken_repeat_by_repeat():
    # The machine was half as fast in the second repeat; the ratio is 2 in both.
    results = report.Results([
        row("a", 10), row("b", 20), row("a", 20, repeat=1), row("b", 40, repeat=1),
    ])
    key = ("sgd", "1e6", "float32", 1)
    assert results.speedup(key, "a", "b") == 2
    assert results.time(key, "a") == 15
    assert results.bandwidth(key, "a") == pytest.approx(800)
    assert results.speedup(key, "a", "absent") is None


def test_a_target_is_judged_by_its_closest_opponent():
    results = report.Results([row("a", 10), row("b", 20), row("c", 15)])
    target = Target("peers", "sgd", "1e6", "a", ("b", "c", "absent"), 1.6)
    assert results.judge(target) == (1.5, "c")
    assert results.judge(Target("peers", "sgd", "1e9", "a", ("b",), 1.6)) is None


def test_targets_name_contenders_that_exist():
    ours = [*contenders.ENGINE, *contenders.OPTCORE, contenders.OPTCORE_ALONE]
    names = {contender.name for contender in ours} | {contenders.LIMIT, *peers.NAMES}
    for target in TARGETS:
        assert {target.who, *target.than} <= names


@pytest.mark.parametrize("suite", ["engine", "peers"])
def test_report(suite, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        row(name, us * scale, workload=workload, job=job, threads=threads)
        for workload, scale in [("1e5", 1), ("1e6", 10)]
        for job in ("sgd", "momentum", "nesterov")
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
            "README.md": ["bench", "bench-peers"], "docs.md": ["engine", "peers"],
        }[name]
        documents[-1].write_text(
            "before\n" + "".join(f"<!-- {m}:begin -->\nold\n<!-- {m}:end -->\n" for m in markers)
        )
    report.write(summary, tmp_path, *documents)
    report.write(summary, tmp_path, *documents)      # nothing piles up
    text = (tmp_path / f"{suite}.md").read_text()
    assert "| optcore, step() | 80.0 | 150 |" in text
    assert "2.00×" in text
    picture = tmp_path / ("engine.png" if suite == "engine" else "roofline.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    for document in documents:
        content = document.read_text()
        assert content.startswith("before\n")
        assert content.count("old") == 1        # the other suite's place is left alone
        assert content.count("| --- |") >= 1


def test_markers_must_be_there():
    with pytest.raises(ValueError, match="bench:begin"):
        report.between_markers("nothing", report.BEGIN, report.END, "x")


def test_json_goes_round():
    summary = {"suite": "engine", "machine": MACHINE, "rows": [row("a", 1.5), row("b", 2.5)]}
    assert json.loads(report.to_json(summary)) == summary
