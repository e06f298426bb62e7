"""How `megabase generate` draws sequences, batch by batch.

Sequence k of prompt p is a function of the seed, p, k and the logits alone. Rounding of logits depends on how many
sequences are read together, so batches always have the same number of rows: one that is not full is filled with copies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import dnaio
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabase.datamodules.alphabet import BOS, FIRST_LETTER, Alphabet
from megabase.datamodules.prepare.portions import Portion
from megabase.models.chance import Purpose, Seeds
from megabase.models.generation import Sampling, State, read, start
from megabase.pipeline.errors import RunError, UserError, first_line
from megabase.pipeline.inference.model import LoadedModel
from megabase.pipeline.inference.motifs import Automaton, Guide, Motif, share_bounds
from megabase.pipeline.inference.partial import WHOLE

BOTH = "both"
DIGITS = 5
"""Decimals of a log-probability in the JSONL file."""


@dataclass(frozen=True)
class GenerateOptions:
    """The arguments of the command.

    Attributes:
        model: a run directory or an export.
        output: the FASTA file to write; the JSONL file beside it has the same name but for its suffix.
        length: letters of a sequence, those of its prompt not counted.
        prompts: FASTA; None: sequences begin with nothing.
        number: sequences for each prompt.
        temperature, top_k, top_p: see megabase.models.generation.Sampling.
        seed: of the draws.
        stop: motifs that end a sequence.
        forbid: motifs that no sequence may have.
        forbid_strand: "both", or "forward" for the motifs as they are written only.
        gc: bounds LO:HI of the share of G and C in each sequence.
        batch: sequences that are read together.
        step: of the checkpoint; "best"; None: the newest intact one.
        block: letters of prompts that are read at a time.
        portion: of the batches, for this process.
        json: print a summary as JSON.
    """

    model: Path
    output: Path
    length: int
    prompts: Path | None = None
    number: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: Sequence[str] = ()
    forbid: Sequence[str] = ()
    forbid_strand: str = BOTH
    gc: str | None = None
    batch: int = 16
    step: int | str | None = None
    block: int = 1 << 14
    portion: Portion = WHOLE
    json: bool = False


@dataclass(frozen=True)
class Prompt:
    """What a sequence begins with: the name of the record (empty: none), and its letters by number."""

    name: str
    letters: NDArray[np.integer]


@dataclass(frozen=True)
class Drawn:
    """A generated sequence: one line of the JSONL file.

    Attributes:
        name: of the sequence in the FASTA file.
        prompt: name of its prompt; None: it has none.
        number: of the sequence among those of its prompt, from 1.
        seed: of the draws.
        length: letters without the prompt.
        stopped: whether it ends with a stop motif.
        nats: −log-probability of its letters, given all letters before them and the prompt.
        log_probs: the log-probability of each letter.
        sequence: the letters.
    """

    name: str
    prompt: str | None
    number: int
    seed: int
    length: int
    stopped: bool
    nats: float
    log_probs: list[float]
    sequence: str


def read_prompts(path: Path | None, alphabet: Alphabet) -> list[Prompt]:
    """The records of a FASTA file, or one prompt without letters.

    Raises:
        UserError: the file cannot be read, or a prompt is empty or has something that is no letter.
    """
    if path is None:
        return [Prompt("", np.zeros(0, dtype=np.int64))]
    prompts: dict[str, Prompt] = {}
    for name, sequence in _records(path):
        if not sequence:
            raise UserError(f"{path}: prompt {name!r} is empty: remove it, or leave --prompts out")
        if name in prompts:
            raise UserError(f"{path}: two prompts are called {name!r}: give them different names")
        tokens = alphabet.encode(np.frombuffer(sequence.encode("latin-1", "replace"), dtype=np.uint8))
        if (tokens < FIRST_LETTER).any():
            place = int((tokens < FIRST_LETTER).argmax())
            raise UserError(
                f"{path}: prompt {name!r} has {sequence[place]!r} at position {place + 1}, not {alphabet.in_words}: "
                "cut it out"
            )
        prompts[name] = Prompt(name, tokens.astype(np.int64) - FIRST_LETTER)
    if not prompts:
        raise UserError(f"{path}: holds no prompt: give a FASTA file, or leave --prompts out")
    return list(prompts.values())


def _records(path: Path) -> Iterator[tuple[str, str]]:
    """Name and letters of all records, empty ones too, which a FASTA index would leave out. Raises UserError."""
    try:
        with dnaio.open(path, fileformat="fasta") as reader:
            for record in reader:
                yield record.id, record.sequence
    except (OSError, EOFError, dnaio.FileFormatError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read as FASTA: {first_line(error)}") from error


def plan(prompts: Sequence[Prompt], number: int, batch: int) -> list[list[tuple[int, int]]]:
    """The batches: rows of (prompt, number of the sequence). Prompts of a batch stand in a row and are equally long."""
    batches: list[list[tuple[int, int]]] = []
    for _, run in itertools.groupby(range(len(prompts)), lambda i: len(prompts[i].letters)):
        rows = itertools.product(run, range(number))
        while some := list(itertools.islice(rows, batch)):
            batches.append(some)
    return batches


def build_guide(
    options: GenerateOptions, prompts: Sequence[Prompt], alphabet: Alphabet, device: torch.device
) -> Guide | None:
    """What masks letters, on a device; None if no option asks for it.

    Raises:
        UserError: an option cannot work, or no sequence can follow a prompt.
    """
    forbidden = [Motif.parse(text, alphabet, "--forbid") for text in options.forbid]
    stops = [Motif.parse(text, alphabet, "--stop") for text in options.stop]
    if not (forbidden or stops or options.gc):
        return None
    if alphabet.complement is not None and options.forbid_strand == BOTH:
        forbidden += [motif.reverse_complement() for motif in forbidden]
    automaton = Automaton(forbidden, stops, len(alphabet.letters))
    table = automaton.table([automaton.after(prompt.letters) for prompt in prompts])
    counted = np.isin(np.frombuffer(alphabet.letters, dtype=np.uint8), np.frombuffer(b"GC", dtype=np.uint8))
    guide = Guide(table, options.length, gc_bounds(options, alphabet), counted).to(device)
    for number, prompt in enumerate(prompts):
        if not guide.allowed(guide.start([number]), 0).any():
            given = " and ".join(f"--{name}" for name in ("forbid", "gc") if getattr(options, name))
            after = f" after prompt {prompt.name!r}" if prompt.name else ""
            raise UserError(
                f"{given}: no sequence of {options.length:,} letters{after} satisfies this: give fewer motifs, or "
                "wider bounds"
            )
    return guide


def gc_bounds(options: GenerateOptions, alphabet: Alphabet) -> tuple[int, int] | None:
    """The fewest and most G and C of a sequence; None without --gc. Raises UserError."""
    if options.gc is None:
        return None
    if alphabet.name != "dna":
        raise UserError(
            f"--gc {options.gc}: the model's alphabet is {alphabet.name!r}, without bases: leave it out"
        )
    if options.stop:
        raise UserError(
            "--gc with --stop: where a sequence stops is not known before, so its share of G and C is not either: "
            "leave one of them out"
        )
    low, colon, high = options.gc.partition(":")
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = math.nan, math.nan
    if not (colon and 0.0 <= bounds[0] <= bounds[1] <= 1.0):
        raise UserError(f"--gc {options.gc}: give two shares LO:HI between 0 and 1, such as 0.4:0.6")
    fewest, most = share_bounds(*bounds, options.length)
    if fewest > most:
        raise UserError(
            f"--gc {options.gc}: no number of {options.length} letters is such a share: give wider bounds"
        )
    return fewest, most


@torch.no_grad()
def draw_batch(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    rows: Sequence[tuple[int, int]],
    guide: Guide | None,
    options: GenerateOptions,
    advance: Callable[[int], None] = lambda letters: None,
) -> list[Drawn]:
    """Draw the sequences of a batch, on the device of the model.

    Args:
        rows: one of the batches of `plan`.
        guide: on the same device.
        advance: called with the number of letters that were drawn since the last call.

    Raises:
        RunError: the logits are not finite, or no letter can follow.
    """
    device = next(loaded.model.parameters()).device
    filled = [*rows, *([rows[-1]] * (options.batch - len(rows)))]
    logits, state = read_rows(loaded, prompts, [prompt for prompt, _ in filled], options.block)
    samples = torch.tensor([(prompt << 32) + number for prompt, number in filled], device=device)
    keys = Seeds(run=options.seed, samples=samples).keys(Purpose.SAMPLING, 0, len(filled), device)
    chooser = Chooser(loaded, options, guide, keys, [prompt for prompt, _ in filled])
    tokens = torch.zeros(len(filled), options.length, dtype=torch.long, device=device)
    log_probs = torch.zeros(len(filled), options.length, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for i in range(options.length):
        if i:
            logits = read(loaded.model, tokens[:, i - 1 : i], state)
        finite &= logits.isfinite().all()
        tokens[:, i] = chooser.choose(logits, i, state.position)
        log_probs[:, i] = logits.float().log_softmax(-1).gather(1, tokens[:, i : i + 1]).squeeze(1)
        advance(len(rows))
        if chooser.all_stopped():
            advance(len(rows) * (options.length - i - 1))
            break
    if not finite:
        raise RunError("the model's logits are not finite: take a checkpoint from before it diverged")
    found = zip(
        rows, chooser.lengths.tolist(), chooser.stopped.tolist(), tokens.cpu(), log_probs.cpu(), strict=False
    )
    return [
        Drawn(
            name=f"{prompts[prompt].name or 'generated'}_{number + 1}",
            prompt=prompts[prompt].name or None,
            number=number + 1,
            seed=options.seed,
            length=length,
            stopped=stopped,
            nats=-float(of_letters[:length].double().sum()),
            log_probs=[round(value, DIGITS) for value in of_letters[:length].tolist()],
            sequence=loaded.alphabet.decode(letters[:length].numpy()).decode("ascii"),
        )
        for (prompt, number), length, stopped, letters, of_letters in found
    ]


class Chooser:
    """Draws the next token of every row under the masks of the guide, and notes where sequences stop.

    Attributes:
        lengths: (rows,) int64, letters of each sequence: up to its stop motif, or all.
        stopped: (rows,) bool, whether a sequence has ended with a stop motif.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: GenerateOptions,
        guide: Guide | None,
        keys: Tensor,
        prompts: Sequence[int],
    ) -> None:
        letters = range(FIRST_LETTER, FIRST_LETTER + len(loaded.alphabet.letters))
        self.sampling = Sampling(options.temperature, options.top_k, letters, options.top_p)
        self.keys, self.guide, self.stops = keys, guide, bool(options.stop)
        self.lengths = torch.full((len(prompts),), options.length, device=keys.device)
        self.stopped = torch.zeros(len(prompts), dtype=torch.bool, device=keys.device)
        self._state = None if guide is None else guide.start(prompts)

    def choose(self, logits: Tensor, step: int, position: int) -> Tensor:
        """The token (rows,) of each row from logits (rows, vocabulary). Raises RunError if a row has none."""
        if self.guide is None or self._state is None:
            return self.sampling.draw(logits, self.keys, position)
        letters = self.guide.allowed(self._state, step) | self.stopped[:, None]
        if not letters.any(dim=1).all():
            raise RunError(
                f"--gc with --forbid: no letter can follow letter {step} of a sequence: give wider bounds, or fewer "
                "motifs"
            )
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        allowed[:, FIRST_LETTER:] = letters
        token = self.sampling.draw(logits, self.keys, position, allowed)
        self._state, stopped = self.guide.advance(self._state, token - FIRST_LETTER)
        self.lengths = self.lengths.where(self.stopped | ~stopped, step + 1)
        self.stopped |= stopped
        return token

    def all_stopped(self) -> bool:
        """Whether every sequence has ended."""
        return self.stops and bool(self.stopped.all())


def read_rows(
    loaded: LoadedModel, prompts: Sequence[Prompt], rows: Sequence[int], at_once: int
) -> tuple[Tensor, State]:
    """Read the prompts of a batch, each once: the logits after them, and the state, with one row for each of `rows`."""
    distinct = list(dict.fromkeys(rows))
    letters = np.stack([prompts[prompt].letters for prompt in distinct])
    tokens = torch.from_numpy(np.pad(letters + FIRST_LETTER, ((0, 0), (1, 0)), constant_values=BOS))
    device = next(loaded.model.parameters()).device
    state = start(loaded.model, len(distinct), seeds=Seeds(run=loaded.config.run.seed))
    for block in tokens.split(max(1, at_once // len(distinct)), dim=1):
        logits = read(loaded.model, block.to(device), state)
    chosen = [distinct.index(prompt) for prompt in rows]
    return logits[chosen], state.fork(chosen)
