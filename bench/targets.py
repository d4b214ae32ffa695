"""What the project has promised itself about speed: one table, judged by every report."""
from __future__ import annotations

from dataclasses import dataclass

from cases import HALF, OUTER, OUTERS, ROWS, TOUCHED
from contenders import (
    ALONE,
    FLOWER,
    FUNCTION,
    LIMIT,
    LITERAL,
    OUT,
    OUTER_STEP,
    OUTER_WEIGHTED,
    ROWS_DENSE,
    ROWS_EXACT,
    ROWS_SMALL,
    STEP,
    WIDE,
)
from peers import IN_ROWS, NAMES
from peers import OUTERS as PEERS_OUTER
from samples import Sample

FUSED = "PyTorch, fused"
FIELD = (LITERAL, OUT, *NAMES)

# What an outer step may take beyond the arrays, MB: see resident.py
RESIDENT_MB = 1.0

# A cache line's round trip between cores that share an L3 takes less; across, some hundreds. A
# training's steps are two measurements by that, and its name says which the second is.
FAR_NS = 150
FAR = ", cores far apart"


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
    within_spread: bool = False     # the upper quartile of the ratio counts, not its median
    variant: str = "float32"

    @property
    def opponents(self) -> str:
        """How a report names them."""
        return " or ".join(self.than) if len(self.than) < 3 else "the best of all others"

    def figure(self, ratio: Sample) -> float:
        """Return what must be at least so much."""
        return ratio.high if self.within_spread else ratio.median


def at_the_limit(job: str, workload: str, who: str, threads: int | str = 1) -> list[Target]:
    """Return targets for where the memory decides and, among the best, the minute."""
    return [
        Target("peers", job, workload, who, (LIMIT,), 0.95, threads),
        Target("peers", job, workload, who, FIELD, 1.0, threads, within_spread=True),
    ]


TARGETS = [
    # Arrays as NumPy allocates them, against NumPy; both ways of calling
    *[
        Target("engine", job, workload, who, (than,), at_least)
        for workload, than, figures in [
            ("1e6", OUT, {"sgd": 2.0, "momentum": 2.2, "nesterov": 3.0}),
            ("1e6", LITERAL, {"momentum": 2.3, "nesterov": 25.0}),
            ("5e7", OUT, {"sgd": 1.8, "momentum": 2.0, "nesterov": 2.6}),
        ]
        for job, at_least in figures.items()
        for who in (FUNCTION, STEP)
    ],
    # The cost of a call
    Target("engine", "sgd", "1e3", FUNCTION, (OUT,), 3.0),
    Target("engine", "sgd", "1e3", STEP, (OUT,), 4.0),
    # Whole models
    Target("peers", "momentum", "1000 × 256", STEP, (FUSED,), 20.0),
    Target("peers", "pipeline", "1000 × 256", STEP, (FUSED,), 40.0),
    Target("peers", "momentum", "ResNet-50", STEP, (FUSED,), 1.0),
    *at_the_limit("momentum", "ResNet-50", STEP, "all"),
    *[
        Target("peers", "pipeline", model, STEP, (FUSED,), at_least, threads)
        for model, at_least in [("ResNet-50", 1.6), ("GPT-2 small", 1.4)]
        for threads in (1, "all")
    ],
    # Single vectors
    *[target for who in (FUNCTION, STEP) for target in at_the_limit("sgd", "1e6", who)],
    *[Target("peers", job, "1e6", STEP, FIELD, 1.1) for job in ("momentum", "nesterov")],
    *[
        Target("peers", job, "1e6", STEP, (ALONE,), 1.6, "all")
        for job in ("sgd", "momentum", "nesterov")
    ],
    *[
        Target("peers", job, workload, STEP, (LIMIT,), 0.9, threads)
        for workload in ("1e6", "5e7")
        for threads in (1, "all")
        for job in ("sgd", "momentum", "nesterov")
        if (job, workload, threads) != ("sgd", "1e6", 1)
    ],
    *[
        Target("peers", job, "1e3", STEP, (FUSED,), 40.0)
        for job in ("sgd", "momentum", "nesterov")
    ],
    # Adam
    *[Target("peers", "adam", length, STEP, FIELD, 1.2) for length in ("1e6", "5e7")],
    Target("peers", "adam", "5e7", STEP, (LIMIT,), 0.9),
    *[
        Target("peers", "adam", model, STEP, (FUSED,), 1.0, threads)
        for model in ("ResNet-50", "GPT-2 small") for threads in (1, "all")
    ],
    Target("peers", "adam", "1000 × 256", STEP, (FUSED,), 10.0),
    # In training: a third of its speed where the cores are near
    *[
        Target("peers", "momentum", "digits net in training", who + FAR, (who,), 1 / 3, "all")
        for who in (ALONE, STEP)
    ],
    # Narrow storage, where all cores wait for DRAM
    *[
        Target("storage", "momentum", "5e7", STEP, (than,), at_least, "all", variant=storage)
        for storage, than, at_least in [
            ("bfloat16 velocity", WIDE, 1.15),
            ("bfloat16 gradients and velocity", WIDE, 1.3),
            (HALF, WIDE, 1.5),
            ("split, bfloat16 gradients", WIDE, 1.0),
            (HALF, "PyTorch, for-loop", 3.0),
            (HALF, "PyTorch, foreach", 3.0),
        ]
    ],
    # Outer steps
    *[
        Target("outer", OUTER, workload, who, than, at_least, threads, variant=replicas)
        for workload in ("2.5e7", "1e8")
        for replicas in OUTERS
        for threads in (1, "all")
        for who, than, at_least in [
            (OUTER_WEIGHTED, (FLOWER,), 3.0),
            (OUTER_STEP, tuple(peer.name for peer in PEERS_OUTER), 1.5),
            (OUTER_STEP, (LIMIT,), 0.9),
        ]
    ],
    # Rows: what a step costs does not depend on the table
    *[
        Target("rows", ROWS, "1e6", ROWS_EXACT, (than,), at_least, variant=f"1,000 rows, {drawn}")
        for drawn in ("uniform", "Zipf")
        for than, at_least in [(ROWS_DENSE, 100.0), (IN_ROWS[0].name, 3.0)]
    ],
    *[
        Target("rows", ROWS, "1e7", ROWS_EXACT, (ROWS_SMALL,), 1 / 1.5, variant=touched)
        for touched, rows in TOUCHED.items() if rows.zipf
    ],
]
