"""The whole field: models, single vectors and trainings, every peer here, and the limit."""
from __future__ import annotations

import peers
import pytest
from cases import PIPELINE, Case
from contenders import ALONE, NUMPY, OPTCORE, OPTCORE_ALONE, STEP
from limit import NoCompilerError, limit_contender
from machine import cores
from ordering import interleave
from shapes import MODELS, TRAININGS
from targets import FUSED

LENGTHS = ["1e3", "1e4", "1e5", "1e6", "1e7", "5e7"]
QUICK_LENGTHS = ["1e3", "1e6"]
QUICK_MODELS = ["MLP", "1000 × 256"]


@pytest.fixture(scope="session", autouse=True)
def threads(request):
    """Tell every library once how many threads this run is about."""
    peers.set_threads(request.config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    threads, quick = option("--threads"), option("--quick")
    models = [
        Case(job, model, threads=threads)
        for model in (QUICK_MODELS if quick else MODELS) if model not in TRAININGS
        for job in ("momentum", "adam", PIPELINE)
    ]
    vectors = [
        Case(job, length, threads=threads)
        for length in (QUICK_LENGTHS if quick else LENGTHS)
        for job in ("sgd", "momentum", "nesterov", "adam")
    ]
    trainings = [
        Case(job, network, threads=threads)
        for network in TRAININGS if threads == cores() for job in ("sgd", "momentum")
    ]
    # The limit goes right before optcore: the two are compared most closely.
    ours = [*OPTCORE, *[OPTCORE_ALONE] * (threads > 1)]
    field = [*NUMPY, *peers.installed()]
    everyone = [limit_contender(option("--build-folder")), *ours, *field]
    users = [c for c in (*ours, *field) if c in NUMPY or c.name in (STEP, ALONE, FUSED)]
    interleave(metafunc, ([*models, *vectors], everyone), (trainings, users))


def test_step(measure, case, repeat, contender):
    try:
        measure(case, repeat, contender)
    except NoCompilerError as reason:
        pytest.skip(str(reason))
