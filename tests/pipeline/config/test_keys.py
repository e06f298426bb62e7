"""Settings by their dotted keys."""

from megabase.pipeline.config.keys import dotted, flatten
from megabase.pipeline.config.schema import RunConfig


def test_nested_keys_are_joined_and_an_empty_dictionary_is_a_value() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [2]}) == {"a.b.c": 1, "a.d": {}, "e": [2]}


def test_every_setting_of_a_run_has_a_key() -> None:
    settings = dotted(RunConfig())
    assert settings["optim.lr"] == 1e-3 and settings["model.lsh.rounds"] == 4
    assert settings["zero.deepspeed"] == {} and not any(isinstance(v, dict) and v for v in settings.values())
