"""Portions: together they have every unit once, and what is made of them is what a single prepare makes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.errors import DataError
from megabase.datamodules.files import FileLock
from megabase.datamodules.prepare import unfinished
from megabase.datamodules.prepare.portions import Portion
from megabase.datamodules.prepare.run import prepare, prepare_portion
from megabase.datamodules.prepare.unfinished import Unit

OPTIONS: dict[str, Any] = {"valid": 0.2, "shard_bytes": 4096, "jobs": 1, "progress": False}


@pytest.fixture
def fastas(tmp_path: Path, write_fasta: Callable[[Path, dict[str, bytes]], Path]) -> list[Path]:
    generator = np.random.default_rng(1)
    bases = np.frombuffer(b"ACGTN", np.uint8)
    return [
        write_fasta(tmp_path / f"f{number}.fa", {f"r{number}": generator.choice(bases, length).tobytes()})
        for number, length in enumerate((900, 5000, 3000, 2000, 200, 100))
    ]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.integers(1, 8))
def test_every_unit_is_in_one_portion(sizes: list[int], count: int) -> None:
    units = [Unit(number, (Path(str(number)),)) for number in range(len(sizes))]
    shares = [Portion(number + 1, count).units(units, sizes) for number in range(count)]
    assert sorted(unit.number for share in shares for unit in share) == list(range(len(sizes)))
    loads = [sum(sizes[unit.number] for unit in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.slow
def test_portions_make_what_one_prepare_makes(fastas: list[Path], tmp_path: Path) -> None:
    prepare(fastas, tmp_path / "whole", **OPTIONS)
    output = tmp_path / "out"
    files = [prepare_portion(fastas, output, f"{number}/3", **OPTIONS) for number in (2, 1, 3)]
    assert sum(files) == len(fastas) and not output.exists()
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.portions").glob("*/*.tar")}
    assert prepare_portion(fastas, output, "2/3", **OPTIONS) == files[0]  # twice: nothing is written again
    prepare(fastas, output, **OPTIONS)
    assert content(output) == content(tmp_path / "whole")
    made = sorted(path.stat().st_mtime_ns for path in output.glob("*.tar"))
    assert made == sorted(written.values())
    assert not list(tmp_path.glob("out.p*"))


def test_what_no_portion_has_finished_is_written_at_the_end(fastas: list[Path], tmp_path: Path) -> None:
    prepare(fastas, tmp_path / "whole", **OPTIONS)
    output = tmp_path / "out"
    assert prepare_portion(fastas, output, "9/9", **OPTIONS) == 0  # more portions than units
    prepare_portion(fastas, output, "1/2", **OPTIONS)
    prepare_portion(fastas, output, "2/5", **OPTIONS)  # of another number, in part the same units
    for shard in list((tmp_path / "out.portions" / "1-of-2").glob("*.tar"))[:1]:
        os.truncate(shard, shard.stat().st_size - 1)
    prepare(fastas, output, **OPTIONS)
    assert content(output) == content(tmp_path / "whole")


@pytest.mark.slow
def test_killed_while_units_are_moved(
    fastas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename of the call that publishes, the next one makes the same shards."""
    prepare(fastas, tmp_path / "whole", **OPTIONS)
    rename, output = Path.rename, tmp_path / "out"
    for number in (1, 2):
        prepare_portion(fastas, output, f"{number}/2", **OPTIONS)
    for allowed in range(0, 40, 3):
        left = [allowed]

        def dying(self: Path, target: Path, left: list[int] = left) -> Path:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", dying)
        try:
            prepare(fastas, output, **OPTIONS)
            break
        except KeyboardInterrupt:
            assert not output.exists() or content(output)
        finally:
            monkeypatch.undo()
        if output.exists():
            break
    else:
        prepare(fastas, output, **OPTIONS)
    assert {name: each for name, each in content(output).items() if name.startswith(("shard", "index"))} == {
        name: each
        for name, each in content(tmp_path / "whole").items()
        if name.startswith(("shard", "index"))
    }


@pytest.mark.parametrize("portion", ["0/3", "4/3", "3", "a/b", "1/3/5", "-1/3", "1/0", ""])
def test_what_is_no_portion_is_refused(portion: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="write K/N with K from 1 to N, such as 3/10"):
        prepare_portion([tmp_path / "a.fa"], tmp_path / "out", portion)


def test_portions_that_disagree_are_named(fastas: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    prepare_portion(fastas, output, "1/2", **OPTIONS)
    with pytest.raises(DataError, match=r"out\.portions/1-of-2: was begun with other arguments \(--valid\)"):
        prepare_portion(fastas, output, "1/2", **{**OPTIONS, "valid": 0.3})
    prepare_portion(fastas, output, "2/2", **{**OPTIONS, "valid": 0.3})
    with pytest.raises(DataError, match=r"out\.portions/2-of-2: was begun with other arguments \(--valid\)"):
        prepare(fastas, output, **OPTIONS)
    assert not output.exists()


def test_a_portion_that_is_being_written_is_waited_for(
    fastas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "_LOCK_TRIES", 2)
    output = tmp_path / "out"
    prepare_portion(fastas, output, "1/2", **OPTIONS)
    with FileLock.take(tmp_path / "out.portions" / "1-of-2" / ".lock"):
        for call in (
            lambda: prepare(fastas, output, **OPTIONS),
            lambda: prepare_portion(fastas, output, "1/2", **OPTIONS),
        ):
            with pytest.raises(DataError, match=r"1-of-2: another prepare is writing it: wait for it"):
                call()


def test_a_pipe_has_no_portions(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"--portion 1/2: .*pipe is a pipe, which only one"):
        prepare_portion([tmp_path / "pipe"], tmp_path / "out", "1/2")
