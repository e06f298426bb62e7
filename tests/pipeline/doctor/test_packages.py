"""Installed packages against ranges and against the lock."""

from pathlib import Path

from megabase.pipeline.doctor.finding import NOTE, OK, WRONG
from megabase.pipeline.doctor.packages import check_lock, check_packages

INSTALLED = {"torch": "2.13.0+cpu", "rich": "15.0"}


def test_ranges() -> None:
    assert check_packages().state == OK  # of the environment that runs the tests
    needed = [
        "torch>=2.6",
        "rich>=13",
        "scikit-learn>=1 ; extra == 'finetune'",
        "pywin32; sys_platform == 'win32'",
    ]
    found = check_packages(needed, INSTALLED.get)
    assert found.state == OK and "2 packages in their ranges" in found.text
    found = check_packages([*needed, "rich<14", "omegaconf"], INSTALLED.get)
    assert found.state == WRONG
    assert found.text == "rich 15.0 is not <14; omegaconf is missing"
    assert "pip install megabase" in found.way_out


def test_lock(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    assert check_lock(lock) == []
    lock.write_text("# of the tests\ntorch==2.13.0\nrich==15.0\nabsent==1.0\n")
    [found] = check_lock(lock, INSTALLED.get)
    assert (found.state, found.text) == (OK, "2 packages as the tests ran with")
    lock.write_text("torch==2.12.1\nrich==15.0\n")
    [found] = check_lock(lock, INSTALLED.get)
    assert (found.state, found.text) == (NOTE, "torch 2.13.0+cpu instead of 2.12.1")
    assert found.way_out.endswith("-m pip install -r requirements.lock")
