"""Reading and checking the options of `megabase bench`, before minutes of measuring."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import torch

from megabase.pipeline.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def lengths_of(option: str, text: str) -> list[int]:
    """ "4k,16k,1M" as tokens, ascending: k is 1,024, M is 1,048,576. Raises UserError."""
    return sorted({_length(option, part.strip()) for part in text.split(",")})


def _length(option: str, text: str) -> int:
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    if not match or int(match[1]) == 0:
        raise UserError(
            f"{option}: {text!r} is not a length: write 4096, 4k or 1M, several with commas between"
        )
    return int(match[1]) * UNITS[match[2].lower()]


def depths_of(option: str, text: str) -> list[int]:
    """ "2,6,12" as numbers of layers, ascending; "0" or nothing: none. Raises UserError."""
    parts = [part.strip() for part in text.split(",") if part.strip() not in ("", "0")]
    for part in parts:
        if not part.isdecimal():
            raise UserError(
                f"{option}: {part!r} is not a depth: write 6, several with commas between, or 0 for none"
            )
    return sorted({int(part) for part in parts})


def names_of(option: str, text: str | None, known: Iterable[str], default: list[str]) -> list[str]:
    """Contestants in the order typed, each once. Raises UserError, naming the closest known one."""
    if text is None:
        return default
    known = list(known)
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"{option}: unknown contestant {name!r}; {hint}known: {', '.join(known)}")
    return names


def device_of(text: str) -> str:
    """cpu or cuda; "auto" is cuda on a machine with a GPU. Raises UserError."""
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch sees no GPU here; take --device cpu, or a build of torch for CUDA"
        )
    return text


def positive(option: str, value: float) -> None:
    """Raise UserError unless the value is above zero."""
    if not value > 0:
        raise UserError(f"{option} {value}: must be above zero")
