"""Our alphabets as tokenizers of `transformers`: one token for each byte, with the ids of `datamodules.alphabet`.

They are plain `tokenizer.json` files, which AutoTokenizer loads without code of ours. Text becomes bytes, and each byte
one of 256 characters (the byte level of GPT-2); a BPE model without merges takes every character by itself. So a letter
that the alphabet does not have gives as many OTHER tokens as it has bytes in UTF-8, as in `Alphabet`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megabase.datamodules.alphabet import BOS, FIRST_LETTER, MASK, OTHER, PAD, SEP, Alphabet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = {PAD: "[PAD]", BOS: "[BOS]", SEP: "[SEP]", MASK: "[MASK]"}
_OTHER = "[OTHER]"


def tokenizer_of(alphabet: Alphabet, max_length: int | None) -> PreTrainedTokenizerFast:
    """A tokenizer that encodes text as `[BOS]` and then the tokens of `alphabet.encode`.

    Lower case is read as upper case where the alphabet does so. `[MASK]` in the text is the mask. `decode` with
    `skip_special_tokens=True` writes what `alphabet.decode` does, but nothing for the mask.

    Args:
        alphabet: of the model.
        max_length: tokens that the model takes; the tokenizer warns of a longer text. None: any number.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    shown = _shown_bytes()
    letters = [shown[byte] for byte in alphabet.letters]
    unknown = shown[alphabet.unknown[0]]
    other = _OTHER if unknown in letters else unknown
    vocabulary = {text: token for token, text in _SPECIAL.items()} | {other: OTHER}
    vocabulary |= {letter: FIRST_LETTER + number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=other))
    if alphabet.soft is not None:
        upper = [normalizers.Replace(chr(byte).lower(), chr(byte)) for byte in alphabet.letters]
        tokenizer.normalizer = normalizers.Sequence(upper)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = _SPECIAL[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[PAD],
        bos_token=bos,
        sep_token=_SPECIAL[SEP],
        mask_token=_SPECIAL[MASK],
        clean_up_tokenization_spaces=False,
        **({} if max_length is None else {"model_max_length": max_length}),
    )


def save_tokenizer(alphabet: Alphabet, max_length: int | None, directory: Path) -> None:
    """Write the files that AutoTokenizer loads; arguments as for `tokenizer_of`."""
    tokenizer_of(alphabet, max_length).save_pretrained(directory)


def _shown_bytes() -> list[str]:
    """The character for each byte at the byte level: itself where it can be printed, else one from U+0100 on."""
    printed = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]
