"""The whole field: models and single vectors, every peer that is installed, and the limit."""
from __future__ import annotations

import peers
import pytest
from cases import PIPELINE, Case
from contenders import LIMIT, NUMPY, OPTCORE, OPTCORE_ALONE
from limit import NoCompilerError, limit_contender
from ordering import interleave
from shapes import MODELS

LENGTHS = ["1e3", "1e4", "1e5", "1e6", "1e7", "5e7", "1e8"]
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
        for model in (QUICK_MODELS if quick else MODELS) for job in ("momentum", PIPELINE)
    ]
    vectors = [
        Case(job, length, threads=threads)
        for length in (QUICK_LENGTHS if quick else LENGTHS)
        for job in ("sgd", "momentum", "nesterov")
    ]
    # The limit goes right before optcore: the two are compared most closely.
    ours = [limit_contender(option("--build-folder")), *OPTCORE]
    ours += [OPTCORE_ALONE] if threads > 1 else []
    field = [*NUMPY, *peers.installed()]
    interleave(metafunc, [*models, *vectors], [*ours, *field])


def test_step(measure, case, repeat, contender):
    try:
        measure(case, repeat, contender, verify=contender.name != LIMIT)
    except NoCompilerError as reason:
        pytest.skip(str(reason))
