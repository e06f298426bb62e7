"""The tokenizer of an export for `transformers` agrees with our alphabet, token by token."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.alphabet import BOS, MASK, PAD, Alphabet
from megabase.pipeline.inference.tokenizer import save_tokenizer, tokenizer_of

NAMES = ("dna", "protein", "bytes")
# Letters, lower case, IUPAC codes, gaps, white space, control characters, and letters of several bytes.
TEXTS = st.text(
    st.sampled_from("ACGTacgtNnRYUuWKX-.* \n\t\0KLMVkvzZ~0_'\"\\")
    | st.characters(exclude_characters="[", codec="utf-8")
)


@cache
def tokenizer(name: str) -> Any:
    return tokenizer_of(Alphabet.named(name), 64)


def encoded(name: str, text: str) -> list[int]:
    return Alphabet.named(name).encode(np.frombuffer(text.encode(), np.uint8)).tolist()


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS)
def test_its_tokens_and_its_text_are_those_of_the_alphabet(name: str, text: str) -> None:
    tokens = tokenizer(name)(text, verbose=False)["input_ids"]
    assert tokens == [BOS, *encoded(name, text)]
    assert tokenizer(name)(text, add_special_tokens=False, verbose=False)["input_ids"] == tokens[1:]
    decoded = tokenizer(name).decode(tokens, skip_special_tokens=True)
    assert decoded.encode() == Alphabet.named(name).decode(np.array(tokens))


@pytest.mark.parametrize("name", NAMES)
def test_autotokenizer_loads_it_without_code_of_ours(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(Alphabet.named(name), 64, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == Alphabet.named(name).vocab_size and loaded.model_max_length == 64
    assert loaded("ACGTnV")["input_ids"] == [BOS, *encoded(name, "ACGTnV")]
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.mask_token_id) == (PAD, BOS, MASK)
    batch = loaded(["AC[MASK]", "A"], padding=True)
    assert batch["input_ids"][0][-1] == MASK
    assert batch["input_ids"][1][2:] == [PAD, PAD] and batch["attention_mask"][1] == [1, 1, 0, 0]
