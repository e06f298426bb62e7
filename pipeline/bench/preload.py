"""Imports every peer that is installed: for the process that the memory probes are forked from."""

from contextlib import suppress

from megabase.pipeline.bench import attention, model, peers

__all__ = ["attention", "model"]

for _module in peers.MODULES:
    with suppress(Exception):  # a peer that is missing or broken is reported where it should run
        peers.load(_module)
