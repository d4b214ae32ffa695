"""A short round of the fuzzer; ``python tests/fuzz.py`` runs as long a one as is wanted."""
from __future__ import annotations

import pytest
import twin
from fuzz import LifeError, fuzz, live, shortened


@pytest.mark.parametrize("seed", range(24))
def test_life(seed, tmp_path):
    live(seed, range(60), tmp_path if seed % 8 == 0 else None)


def test_a_fault_is_found_and_its_life_shortened(monkeypatch):
    """Here it is the twin that is wrong."""
    monkeypatch.setattr(twin, "averaged", lambda e, x, decay: e)
    _, failures = fuzz(seed=0, n_operations=2000, length=60, folder=None, most_failures=1)
    only = shortened(failures[0], range(60))
    assert only[-1] == failures[0].at
    assert len(only) <= 3       # averages are begun, and a step is taken
    with pytest.raises(LifeError):
        live(failures[0].seed, only)
