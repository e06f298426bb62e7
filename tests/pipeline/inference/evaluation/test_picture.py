"""The picture of an evaluation."""

from pathlib import Path

import pytest

from megabase.pipeline.inference.evaluation.picture import draw
from tests.pipeline.inference.evaluation.made import made


@pytest.mark.parametrize(
    "changes", [{}, {"contexts": [], "cases": [], "classes": [], "recall": None, "markov": {}}]
)
def test_it_is_drawn_whatever_was_measured(tmp_path: Path, changes: dict) -> None:
    draw(made(**changes), tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_names_of_lines_are_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    seen = []
    before = Axes.annotate
    monkeypatch.setattr(
        Axes, "annotate", lambda self, text, *a, **k: seen.append(text) or before(self, text, *a, **k)
    )
    draw(made(), tmp_path / "evaluation.png")
    assert seen == ["Markov order 1", "xz"]
