"""Two ranks that do not meet. (In test_run.py they do.)"""

import pytest

from megabase.pipeline.doctor.finding import WRONG
from megabase.pipeline.doctor.network import check_ranks
from megabase.pipeline.ranks.network import INTERFACE


@pytest.mark.slow
def test_an_interface_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "none0")
    found = check_ranks("gloo")
    assert found.state == WRONG and "none0" in found.text and "slurm.interface" in found.way_out


def test_ranks_that_take_too_long() -> None:
    found = check_ranks("gloo", timeout_s=0.1)
    assert found.state == WRONG and "did not meet within" in found.text
