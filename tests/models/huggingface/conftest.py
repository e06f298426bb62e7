"""A fixture that gives two models the same hash buckets."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor, nn

from megabase.models.attention.kernels.inputs import SortedOrder
from megabase.models.attention.lsh import LSHAttention


@pytest.fixture
def same_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """same_buckets(model): from then on, LSH layers of megabase use the buckets that the transformers model last had in
    the layer of the same number."""
    found: dict[int, Tensor | None] = {}
    attend = LSHAttention.attend

    def attend_in_same_buckets(
        layer: LSHAttention, qk: Tensor, v: Tensor, order: SortedOrder, call: Any
    ) -> Tensor:
        buckets = found[layer.layer]
        # None if the sequence fits one chunk: then buckets do not matter. Those of transformers may end with padding.
        if buckets is not None:
            mask = None if call.mask is None else call.mask.repeat_interleave(qk.shape[1], dim=0)
            order = SortedOrder.by_bucket(buckets[..., : qk.shape[2]].flatten(0, 1), mask)
        return attend(layer, qk, v, order, call)

    def note(layer: nn.Module, _: object, result: Any) -> None:
        found[layer.layer_idx] = result.buckets

    def watch(model: nn.Module) -> None:
        monkeypatch.setattr(LSHAttention, "attend", attend_in_same_buckets)
        for module in model.modules():
            if type(module).__name__ == "LSHSelfAttention":
                module.register_forward_hook(note)

    return watch
