"""Eight threads at once; without the GIL where there is none."""
import pytest
from storms import STORMS


@pytest.mark.parametrize("storm", STORMS, ids=lambda storm: storm.__name__)
def test_storm(storm):
    assert storm(0.3) == []
