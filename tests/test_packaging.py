"""One import name: what a wheel puts into an environment, and that a user's own modules cannot get in its way."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import DATA, START_S, train_settings, training_rows

ROOT = Path(__file__).parents[1]
# Names of packages of this repository, which a user's directory may well hold, too.
TAKEN = ("models", "datamodules", "pipeline", "configs", "slurm")


def build(target: str, directory: Path) -> Path:
    """The wheel of this checkout that hatchling builds for `target`: `wheel` or `wheel:editable`."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [wheel] = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build("wheel", tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment in which the wheel is installed; its dependencies are this environment's."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, symlinks=True)
    python = directory / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    packages = next((directory / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory / "bin"


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A working directory that holds modules of our packages' names, and an environment with it on PYTHONPATH."""
    for name in TAKEN:
        text = f"raise ImportError('the {name} of the working directory was imported')\n"
        if name == "pipeline":
            (tmp_path / "pipeline.py").write_text(text)
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(text)
    return tmp_path, os.environ | {
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def test_a_wheel_adds_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"megabase"}
    assert {name.split("/")[1] for name in names if name.startswith("megabase/")} == {"__init__.py", *TAKEN}


def test_an_editable_installation_holds_no_copy_of_the_code(tmp_path: Path) -> None:
    names = zipfile.ZipFile(build("wheel:editable", tmp_path)).namelist()
    code = [name for name in names if ".dist-info/" not in name]
    assert code
    assert all(name.startswith("_editable_impl_megabase.") for name in code)


def test_a_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", *TAKEN], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert {f"megabase/{name}" for name in tracked if (ROOT / name).exists()} <= names


def test_the_repository_has_a_link_for_each_package() -> None:
    assert {path.name for path in (ROOT / "megabase").iterdir() if path.is_symlink()} == set(TAKEN)
    for name in TAKEN:
        assert (ROOT / "megabase" / name).resolve() == ROOT / name


@pytest.mark.slow
def test_modules_of_the_same_names_in_the_working_directory_are_not_imported(
    installed: Path, hostile: tuple[Path, dict[str, str]]
) -> None:
    directory, environment = hostile
    program = (
        "import megabase; from megabase.models import Reformer; print(megabase.__file__, Reformer.__module__)"
    )
    done = subprocess.run(
        [str(installed / "python"), "-c", program],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(next(installed.parent.glob("lib/python*/site-packages")) / "megabase" / "__init__.py"),
        "megabase.models.reformer",
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_installed_command_trains_two_ranks_from_such_a_directory(
    installed: Path, hostile: tuple[Path, dict[str, str]]
) -> None:
    directory, environment = hostile
    megabase = str(installed / "megabase")
    settings = train_settings(directory / "shards", directory / "runs", "wheel", "trainer.max_steps=2")
    for arguments in (
        ["prepare", str(DATA / "lambda_phage.fna.gz"), str(directory / "shards"), "--valid", "0.1"],
        ["train", *settings, "trainer.eval_every_steps=0", "tracking.enabled=false"],
    ):
        done = subprocess.run(
            [megabase, *arguments],
            cwd=directory, env=environment, capture_output=True, text=True, timeout=START_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert [row["step"] for row in training_rows(directory / "runs" / "wheel")] == [1, 2]
