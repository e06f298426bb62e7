"""Imports every peer that is installed, for the server process that the memory probes are forked from (`lab.py`)."""

from contextlib import suppress

from megabase.pipeline.bench import attention_task, model_task, peers

__all__ = ["attention_task", "model_task"]

for _module in peers.MODULES:
    with suppress(Exception):  # a peer that is missing or broken is reported when its turn comes
        peers.load(_module)
