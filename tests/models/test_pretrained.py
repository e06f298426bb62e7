"""A directory of config.json and model.safetensors is loaded as the model that was saved; others are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megabase.models import ConfigError, LSHConfig, Reformer, ReformerConfig, safetensors
from megabase.models.pretrained import from_pretrained, stored_shapes

CONFIG = ReformerConfig(vocab_size=9, dim=12, depth=3, heads=2, max_length=64, lsh=LSHConfig(chunk_length=8))


def save(directory: Path, model: Reformer) -> None:
    weights = model.state_dict()
    directory.mkdir()
    safetensors.write(
        directory / "model.safetensors",
        stored_shapes(model),
        torch.float32,
        lambda name: [weights[name].flatten()],
        {"format": "pt"},
    )
    settings = {"model": dataclasses.asdict(model.body.config), "step": 7}
    (directory / "config.json").write_text(json.dumps(settings))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    save(tmp_path / "out", Reformer(CONFIG))
    return tmp_path / "out"


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_the_one_that_was_saved(tmp_path: Path, tied: bool) -> None:
    model = Reformer(dataclasses.replace(CONFIG, tie_embeddings=tied, head_bias=not tied))
    save(tmp_path / "out", model)
    loaded = from_pretrained(tmp_path / "out")
    assert loaded.body.config == model.body.config
    assert not loaded.training
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert (loaded.head.weight is loaded.body.embedding.tokens.weight) == tied
    stored = safetensors.read(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()  # tied weights once


def test_damaged_weights_are_refused(out: Path) -> None:
    content = (out / "model.safetensors").read_bytes()
    for damaged in (b"", content[:900], content[:-4]):
        (out / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ConfigError, match="export it again"):
            from_pretrained(out)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dim", 24, "does not have the weights that config.json beside it describes"),
        ("depht", 3, "model.depht is a setting that this version does not know"),
        ("dim", "64", "a setting of the model has a value of the wrong type"),
        ("lsh", 5, "model.lsh=5 must be a group of settings"),
    ],
)
def test_settings_that_do_not_fit_are_refused(out: Path, key: str, value: Any, message: str) -> None:
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"model": settings["model"] | {key: value}}))
    with pytest.raises(ConfigError, match=message):
        from_pretrained(out)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff"])
def test_a_file_that_holds_no_config_is_refused(out: Path, content: bytes) -> None:
    (out / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        from_pretrained(out)


def test_files_that_are_missing_are_named(out: Path) -> None:
    for place in (out.parent / "nothing", out / "model.safetensors"):
        with pytest.raises(ConfigError, match=rf"{place.name}/config\.json is missing"):
            from_pretrained(place)
    (out / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"out/model\.safetensors is missing"):
        from_pretrained(out)


def test_an_export_from_before_values_could_look_ahead_loads(tmp_path: Path) -> None:
    """Its settings lack `values_ahead`, and its weights the shares of the values."""
    save(tmp_path / "out", Reformer(dataclasses.replace(CONFIG, values_ahead=False)))
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    del content["model"]["values_ahead"]
    path.write_text(json.dumps(content))
    assert from_pretrained(tmp_path / "out").body.config.values_ahead is False
