"""Which setting a user meant who wrote a key that does not exist."""

from __future__ import annotations

import dataclasses
import difflib

from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.schema import RunConfig

# What other programs call a setting.
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "batch_size": "data.global_batch",
    "epochs": "trainer.max_steps",
    "max_epochs": "trainer.max_steps",
    "steps": "trainer.max_steps",
    "gpus": "trainer.devices",
    "num_gpus": "trainer.devices",
    "ranks": "trainer.devices",
    "num_nodes": "trainer.nodes",
    "num_workers": "data.workers",
    "context_length": "data.length",
    "seq_len": "data.length",
    "seq_length": "data.length",
    "max_seq_len": "data.length",
    "d_model": "model.dim",
    "hidden_size": "model.dim",
    "embed_dim": "model.dim",
    "layers": "model.layers",
    "num_layers": "model.depth",
    "n_layers": "model.depth",
    "num_heads": "model.heads",
    "n_heads": "model.heads",
    "output_dir": "run.root",
    "warmup": "optim.warmup_steps",
}
# How many settings of the same name a hint shows, and how many of a section.
_SHOWN = 3
_SHOWN_OF_SECTION = 40


def sections() -> list[str]:
    """Every section, those within sections included: `model`, `model.lsh`, ..."""
    keys = dotted(RunConfig())
    return sorted({".".join(key.split(".")[:n]) for key in keys for n in range(1, key.count(".") + 1)})


def is_setting(key: str) -> bool:
    """Whether a setting has this key."""
    return key in dotted(RunConfig())


def closest(unknown: str) -> list[str]:
    """The settings that an unknown key may stand for, the likeliest first; empty if none is close.

    A key without its section (`lr`) stands for every setting of that name.
    """
    known = list(dotted(RunConfig()))
    if unknown in known:
        return [unknown]
    section, _, name = unknown.rpartition(".")
    inside = _within(section, name, 0.75)
    same = [key for key in known if key.rpartition(".")[2] == name]
    other = [OTHER_NAMES[name]] if name in OTHER_NAMES else []
    if found := inside or same[:_SHOWN] or other or _within(section, name, 0.5):
        return found
    if section in sections():
        return []
    similar = difflib.get_close_matches(name, {key.rpartition(".")[2] for key in known}, n=1, cutoff=0.75)
    if similar:
        return [key for key in known if key.rpartition(".")[2] == similar[0]][:_SHOWN]
    return difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)


def _within(section: str, name: str, cutoff: float) -> list[str]:
    """The setting of a section whose name is the closest, if it is close enough; empty if there is no such section."""
    names = [key.removeprefix(f"{section}.") for key in dotted(RunConfig()) if key.startswith(f"{section}.")]
    return [f"{section}.{close}" for close in difflib.get_close_matches(name, names, n=1, cutoff=cutoff)]


def hint(unknown: str) -> str:
    """The end of a message about an unknown key: the settings that it may stand for, or what there is to choose."""
    if found := closest(unknown):
        return f"did you mean {' or '.join(map(repr, found))}?"
    section = unknown.rpartition(".")[0]
    if section in sections():
        names = [
            key.removeprefix(f"{section}.") for key in dotted(RunConfig()) if key.startswith(f"{section}.")
        ]
        return f"{section} has {', '.join(names[:_SHOWN_OF_SECTION])}"
    return f"the sections are {', '.join(field.name for field in dataclasses.fields(RunConfig))}"
