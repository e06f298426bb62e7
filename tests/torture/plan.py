"""The plan of a torture test: phase, moment, process and damage of each kill. All follows from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.torture.damages import CHECKPOINT_DAMAGES, OTHER_DAMAGES

IMPORTING, RESUMING, TRAINING = "start-up", "resume", "training"
WRITING, PUBLISHING, PRUNING = "writing", "publish", "pruning"
EVALUATING, FULL_DISK, FULL_START = "evaluation", "full disk", "start on a full disk"
# In the order of the first kills.
PHASES = (WRITING, RESUMING, PUBLISHING, TRAINING, EVALUATING, IMPORTING, PRUNING, FULL_DISK, FULL_START)
NEED_A_SMALL_DISK = (FULL_DISK, FULL_START)
ALL, RANK, SUPERVISOR = "all processes", "rank", "the supervisor"
TARGETS = (ALL, RANK, ALL, SUPERVISOR)


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        number: from 1.
        phase: one of PHASES.
        nth: the occurrence of the phase since the start of the job.
        fraction: of the usual length of the phase, to wait before the kill.
        target: ALL, SUPERVISOR or "rank R". With a full disk, a job that ends by itself is not killed.
        damages: names in CHECKPOINT_DAMAGES and OTHER_DAMAGES, done after the kill.
    """

    number: int
    phase: str
    nth: int
    fraction: float
    target: str
    damages: tuple[str, ...]


def plan(seed: int, kills: int, ranks: int, *, small_disk: bool, chance: float) -> list[Kill]:
    """The kills of a seed. Phases, targets and damages come from shuffled decks, so that each comes regularly."""
    draw = random.Random(seed)
    phases = _deck(draw, [p for p in PHASES if small_disk or p not in NEED_A_SMALL_DISK], in_order=True)
    targets = _deck(draw, TARGETS)
    checkpoint_damages = _deck(draw, CHECKPOINT_DAMAGES)
    others = _deck(draw, OTHER_DAMAGES)
    planned = []
    for number in range(1, kills + 1):
        phase, target = next(phases), next(targets)
        if target == RANK:
            target = f"{RANK} {draw.randrange(ranks)}"
        damages = [next(deck) for deck in (checkpoint_damages, others) if draw.random() < chance]
        planned.append(
            Kill(number, phase, draw.randint(1, 3), draw.random(), target, tuple(damages)),
        )
    return planned


def _deck(draw: random.Random, cards: Any, in_order: bool = False) -> Iterator[Any]:
    """Endless cards: every round holds each once, shuffled; with `in_order` the first round keeps their order."""
    cards = list(cards)
    while True:
        if not in_order:
            draw.shuffle(cards)
        in_order = False
        yield from cards
