"""Mixtures of genomes."""

from dataclasses import replace

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.mixture import identity_of


def test_identity_of_a_mixture_depends_on_its_keys_their_order_and_the_files(genomes: ShardIndex) -> None:
    one, two = ({"a.fa": 2.0, "b*": 1.0}, {"b*": 1.0, "a.fa": 2.0})
    identities = {identity_of(genomes.segments, mixture) for mixture in ({}, one, two)}
    moved = replace(genomes.segments, source=genomes.segments.source[::-1])
    assert moved.identity == genomes.segments.identity == identity_of(moved, {})
    assert len(identities | {identity_of(moved, one)}) == 4
