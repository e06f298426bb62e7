"""`import megabase.models` imports what is used, and nothing else."""

import json
import subprocess
import sys

import pytest

import megabase.models

EXPENSIVE = [
    "torch",
    "numpy",
    "triton",
    "transformers",
    "megabase.models.encoder_decoder",
    "megabase.models.generation",
    "megabase.models.huggingface",
]


def imported_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after the statement."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import megabase.models",
        "from megabase.models import ConfigError, LSHConfig, ReformerConfig",
        "from megabase.models.config import ReformerConfig",
    ],
)
def test_the_settings_need_no_torch(statement):
    assert not imported_by(statement) & set(EXPENSIVE)


@pytest.mark.slow
def test_a_model_needs_neither_generation_nor_an_encoder_decoder_nor_transformers():
    modules = imported_by("from megabase.models import Reformer, Seeds")
    assert "torch" in modules
    assert not modules & {"transformers", *(name for name in EXPENSIVE if name.startswith("megabase"))}


def test_every_exported_name_exists_and_others_do_not():
    for name in megabase.models.__all__:
        assert getattr(megabase.models, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Reformr'"):
        megabase.models.Reformr  # noqa: B018
    with pytest.raises(ImportError, match="Reformr"):
        from megabase.models import Reformr  # noqa: F401
