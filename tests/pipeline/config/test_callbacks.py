"""The forms of `trainer.callbacks`, and the check before ranks start."""

import sys
from pathlib import Path

import pytest

from megabase.pipeline.config.callbacks import check_modules, parse
from megabase.pipeline.config.load import load, save
from megabase.pipeline.errors import UserError

RUN = ["run.name=x", "data.shards=s"]


def test_both_forms_and_yaml_keep_them(tmp_path: Path) -> None:
    value = "trainer.callbacks=[a.b.C,{class: d.E, arguments: {every: 10, names: [x, y]}},{class: f.G}]"
    config = load([], [*RUN, value])
    expected = [("a.b.C", {}), ("d.E", {"every": 10, "names": ["x", "y"]}), ("f.G", {})]
    assert list(parse(config.trainer.callbacks)) == expected
    save(config, tmp_path / "config.yaml")
    assert load([tmp_path / "config.yaml"]) == config
    assert list(parse(load([], RUN).trainer.callbacks)) == []


@pytest.mark.parametrize(
    "entry",
    ["Callback", "a..B", "a.b-c", "3", "{class: 3}", "{arguments: {}}", "{class: a.B, arguments: [1]}"]
    + ["{class: a.B, every: 10}", "{class: a.B, arguments: {1: 2}}", "null", "[a.B]", "os.system(1)"],
)
def test_another_form_is_refused(entry: str) -> None:
    with pytest.raises(
        UserError, match=r"trainer\.callbacks\[0\]=.*: give package\.module\.Class, or {class: "
    ):
        load([], [*RUN, f"trainer.callbacks=[{entry}]"])


def test_a_package_that_is_missing_is_refused_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "explosive_module.py").write_text("raise SystemExit('imported')")
    with pytest.raises(UserError, match=r"explosive_module\.C: no module is named 'explosive_module'"):
        check_modules(["explosive_module.C"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as in the program `megabase`
    with pytest.raises(UserError, match=r"no module is named '__main__'"):
        check_modules(["__main__.C"])
    monkeypatch.chdir(tmp_path)
    check_modules(["explosive_module.C", "pytorch_lightning.callbacks.Nothing"])
