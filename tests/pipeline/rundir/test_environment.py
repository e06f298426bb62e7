"""The record of a run's environment."""

import json
from pathlib import Path

from megabase.pipeline.rundir import environment


def test_the_record_names_versions_hardware_and_the_attention_kernel(tmp_path: Path) -> None:
    environment.write(tmp_path)
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["versions"] == environment.versions()
    assert {"python", "torch", "deepspeed", "pytorch-lightning"} <= written["versions"].keys()
    assert written["cpus"] >= 1 and written["attention"] and written["processor"]


def test_the_list_of_packages_is_one_that_pip_can_install(tmp_path: Path) -> None:
    environment.write(tmp_path)
    lines = (tmp_path / "packages.txt").read_text().splitlines()
    assert lines == sorted(set(lines)) and all(len(line.split("==")) == 2 for line in lines)
    assert f"torch=={environment.versions()['torch']}" in lines
