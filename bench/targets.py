"""What the project has promised itself about speed: one table, judged by every report."""
from __future__ import annotations

from dataclasses import dataclass

from contenders import ALONE, FUNCTION, LIMIT, LITERAL, OUT, STEP
from peers import NAMES

FUSED = "PyTorch, fused"
FIELD = (LITERAL, OUT, *NAMES)


@dataclass(frozen=True)
class Target:
    """`who` shall be `at_least` so many times as fast as the fastest of `than`."""

    suite: str
    job: str
    workload: str
    who: str
    than: tuple[str, ...]
    at_least: float
    threads: int | str = 1      # "all": the run with all of the machine's

    @property
    def opponents(self) -> str:
        """How a report names them."""
        return self.than[0] if len(self.than) == 1 else "the best of all others"


TARGETS = [
    # Arrays as NumPy allocates them, against NumPy; both ways of calling
    *[
        Target("engine", job, workload, who, (than,), at_least)
        for workload, than, figures in [
            ("1e6", OUT, (2.0, 2.2, 3.0)),
            ("1e6", LITERAL, (2.2, 2.3, 25.0)),
            ("5e7", OUT, (1.8, 2.0, 2.6)),
        ]
        for job, at_least in zip(("sgd", "momentum", "nesterov"), figures, strict=True)
        for who in (FUNCTION, STEP)
    ],
    # The cost of a call
    Target("engine", "sgd", "1e3", FUNCTION, (OUT,), 3.0),
    Target("engine", "sgd", "1e3", STEP, (OUT,), 4.0),
    # Whole models
    Target("peers", "momentum", "1000 × 256", STEP, (FUSED,), 20.0),
    Target("peers", "pipeline", "1000 × 256", STEP, (FUSED,), 40.0),
    Target("peers", "momentum", "ResNet-50", STEP, (FUSED,), 1.0),
    Target("peers", "momentum", "ResNet-50", STEP, (FUSED,), 1.2, "all"),
    *[
        Target("peers", "pipeline", model, STEP, (FUSED,), at_least, threads)
        for model, at_least in [("ResNet-50", 1.6), ("GPT-2 small", 1.4)]
        for threads in (1, "all")
    ],
    # Single vectors
    *[
        Target("peers", job, "1e6", STEP, than, at_least, threads)
        for than, at_least, threads in [(FIELD, 1.1, 1), ((ALONE,), 1.6, "all")]
        for job in ("sgd", "momentum", "nesterov")
    ],
    *[
        Target("peers", job, workload, STEP, (LIMIT,), 0.9, threads)
        for workload in ("1e6", "5e7")
        for threads in (1, "all")
        for job in ("sgd", "momentum", "nesterov")
    ],
    *[
        Target("peers", job, "1e3", STEP, (FUSED,), 40.0)
        for job in ("sgd", "momentum", "nesterov")
    ],
]
