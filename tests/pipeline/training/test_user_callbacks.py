"""The callbacks of a user's that `megabase train` loads, and those that it refuses."""

import re
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl

from megabase.pipeline.errors import UserError
from megabase.pipeline.training.user_callbacks import load_callbacks

MODULE = """
import pytorch_lightning as pl
class Every(pl.Callback):
    def __init__(self, every=1):
        self.every = 100 / every
class Other: pass
function = print
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MODULE)
    Path("half.py").write_text("import mine\nclass X(")


def test_callbacks_are_found_in_the_working_directory_and_get_their_arguments() -> None:
    before = list(sys.path)
    plain, with_arguments = load_callbacks(["mine.Every", {"class": "mine.Every", "arguments": {"every": 4}}])
    assert isinstance(plain, pl.Callback) and (plain.every, with_arguments.every) == (100, 25)  # type: ignore[attr-defined]
    assert load_callbacks([]) == [] and sys.path == before


def test_a_module_may_add_to_the_module_path() -> None:
    before = list(sys.path)
    Path("adds.py").write_text(f"import sys\nsys.path.append('lib')\n{MODULE}")
    load_callbacks(["adds.Every"])
    assert sys.path == [*before, "lib"]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("mine.Nothing", "mine.py has no Nothing"),
        ("mine.Other", "is not a class derived from pytorch_lightning.Callback"),
        ("mine.function", "is not a class derived from pytorch_lightning.Callback"),
        ("half.X", "half cannot be imported: SyntaxError"),
        ("none_such.X", "none_such cannot be imported: ModuleNotFoundError"),
        ({"class": "mine.Every", "arguments": {"evry": 4}}, "Every(evry=4) fails: TypeError"),
        ({"class": "mine.Every", "arguments": {"every": 0}}, "Every(every=0) fails: ZeroDivisionError"),
        ("pytorch_lightning.callbacks.ModelCheckpoint", "see checkpoint.*"),
        ("pytorch_lightning.callbacks.EarlyStopping", "trainer.max_steps"),
        ("pytorch_lightning.callbacks.TQDMProgressBar", "its own progress"),
        ("pytorch_lightning.callbacks.LearningRateMonitor", "docs/lightning.md"),
    ],
)
def test_what_cannot_work_is_one_clear_message(entry: object, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as error:
        load_callbacks([entry])
    assert str(error.value).startswith("trainer.callbacks: ") and "\n" not in str(error.value)
