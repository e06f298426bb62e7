"""One sequence over several processes: equal to one process, forward bit for bit, gradients to rounding.

Most tests run the processes as threads, which exchange through memory; one runs real processes under gloo.
"""

import copy
import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megabase.models import LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds
from megabase.models.attention import by_heads
from megabase.models.layers import convolve, convolve_part
from megabase.models.sequence import Loopback, Part

LENGTH = 256
CONFIG = ReformerConfig(
    vocab_size=9,
    dim=32,
    depth=2,
    heads=4,
    layers=["local", "lsh"],
    max_length=LENGTH,
    lsh=LSHConfig(rounds=2, chunk_length=16),
    local=LocalConfig(window=16),
)


@dataclass
class Threads:
    """The exchange of as many threads as `barrier` waits for. Any thread that fails ends the others' waiting."""

    rank: int
    barrier: threading.Barrier
    desk: dict[int, tuple[Tensor, Sequence[int]]] = field(default_factory=dict)

    def __call__(self, sent: Tensor, counts_sent: Sequence[int], counts: Sequence[int]) -> Tensor:
        assert sent.shape[0] == sum(counts_sent)
        self.desk[self.rank] = sent, counts_sent
        self.barrier.wait(60)
        received = [rows.split(list(n))[self.rank] for rows, n in (self.desk[r] for r in sorted(self.desk))]
        assert [rows.shape[0] for rows in received] == list(counts)
        result = torch.cat(received)
        self.barrier.wait(60)
        return result


def in_parts(size: int, length: int, work: Callable[[Part], Any]) -> list[Any]:
    """What `work` returns in each of `size` threads."""
    barrier, desk = threading.Barrier(size), {}
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Part(rank, size, length, Threads(rank, barrier, desk)))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def batch(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(5, 9, (2, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: Reformer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(config: ReformerConfig, size: int, *, training: bool = False, mask: Tensor | None = None) -> None:
    """Hidden states and losses of parts are those of the whole, bit for bit; gradients add up to its gradients."""
    torch.manual_seed(0)
    model = Reformer(config).train(training)
    tokens, labels = batch()
    seeds = Seeds(3, 4, torch.tensor([7, 9]))
    masked = labels if mask is None else labels.masked_fill(~mask, -100)

    def work(part: Part) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        own = copy.deepcopy(model)
        piece = tokens[:, part.rows]
        some = None if mask is None else mask[:, part.rows]
        hidden = own.body(piece, seeds=seeds, mask=some, part=part)
        ordinary = own.body(piece, seeds=seeds, mask=some, part=part, reverse=False)
        assert torch.equal(hidden, ordinary)
        loss = own.head(hidden, masked[:, part.rows])
        loss.backward()
        return hidden.detach(), loss.detach(), gradients(own)

    found = in_parts(size, LENGTH, work)
    hidden = model.body(tokens, seeds=seeds, mask=mask)
    model.head(hidden, masked).backward()
    real = slice(None) if mask is None else mask
    assert torch.equal(torch.cat([each[0] for each in found], dim=1)[real], hidden[real])
    for name, grad in gradients(model).items():
        total = sum(each[2][name] for each in found)
        torch.testing.assert_close(total, grad, rtol=1e-4, atol=2e-5 * float(grad.abs().max()), msg=name)


def test_parts_compute_some_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the rounding of sums over groups of heads, which are other heads in parts than in one process."""
    torch.manual_seed(0)
    model = Reformer(dataclasses.replace(CONFIG, layers=["local", "lsh", "full"], depth=3, dropout=0.1))
    tokens, labels = batch()
    seeds = Seeds(3, 4, torch.tensor([7, 9]))
    expected = model.loss(tokens, labels, seeds=seeds)
    expected.backward()
    monkeypatch.setitem(by_heads.LIMIT, "cpu", 2 * (LENGTH // 2) * 32 // 2)

    def work(part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        own = copy.deepcopy(model)
        own.zero_grad()
        loss = own.loss(tokens[:, part.rows], labels[:, part.rows], seeds=seeds, part=part)
        loss.backward()
        return loss.detach(), gradients(own)

    found = in_parts(2, LENGTH, work)
    torch.testing.assert_close(sum(each[0] for each in found), expected.detach())
    for name, grad in gradients(model).items():
        total = sum(each[1][name] for each in found)
        torch.testing.assert_close(total, grad, rtol=1e-3, atol=2e-4 * float(grad.abs().max()), msg=name)


KINDS = {
    "default": {},
    "full": {"layers": ["full"]},
    "performer": {"layers": ["performer"]},
    "linformer": {"layers": ["linformer"], "causal": False},
    "linformer by head": {"layers": ["linformer"], "causal": False},
    "both sides": {"causal": False},
    "learned": {"positions": "learned"},
    "axial": {"positions": "axial"},
    "no values ahead": {"values_ahead": False},
    "local chunks": {"layers": ["local"], "local": LocalConfig(window=16, attend="chunk")},
    "lsh chunks": {"layers": ["lsh"], "lsh": LSHConfig(rounds=2, chunk_length=16, attend="chunk")},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_parts_equal_the_whole(kind: str, size: int) -> None:
    config = dataclasses.replace(CONFIG, **KINDS[kind])
    if kind == "linformer by head":
        config = dataclasses.replace(config, linformer=dataclasses.replace(config.linformer, share="none"))
    compare(config, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_dropout_and_mask(size: int) -> None:
    config = dataclasses.replace(CONFIG, dropout=0.1, attention_dropout=0.1)
    compare(config, size, training=True)
    mask = torch.arange(LENGTH) < torch.tensor([[200], [LENGTH]])
    compare(CONFIG, size, mask=mask)
    compare(dataclasses.replace(CONFIG, causal=False), size, mask=mask)


@pytest.mark.parametrize(("window", "causal"), [(300, True), (100, True), (16, False), (300, False)])
def test_lengths_that_the_kernels_do_not_divide(window: int, causal: bool) -> None:
    """Parts of 125 positions: neither local attention's pieces nor a window begin where a part does."""
    local = LocalConfig(window=window)
    config = dataclasses.replace(CONFIG, max_length=None, layers=["local"], local=local, causal=causal)
    torch.manual_seed(0)
    model = Reformer(config).eval()
    tokens = torch.randint(5, 9, (1, 1000), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
        parts = in_parts(8, 1000, lambda part: model(tokens[:, part.rows], part=part))
    assert torch.equal(torch.cat(parts, dim=1), whole)


@given(
    size=st.sampled_from([1, 2, 3, 4]),
    n=st.integers(1, 5),
    taps=st.integers(1, 12),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_convolution_of_parts(size: int, n: int, taps: int, data: st.DataObject) -> None:
    """Also where a part is shorter than the taps reach, so that rows come from several others."""
    before = data.draw(st.integers(0, taps - 1))
    length = size * n
    x, weight, grad = torch.randn(2, length, 3), torch.randn(taps, 3), torch.randn(2, length, 3)

    def work(part: Part) -> tuple[Tensor, ...]:
        piece, w = x[:, part.rows].clone().requires_grad_(), weight.clone().requires_grad_()
        y = convolve_part(piece, w, before, part)
        y.backward(grad[:, part.rows])
        return y.detach(), piece.grad, w.grad  # type: ignore[return-value]

    found = in_parts(size, length, work)
    leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    whole = convolve(leaf, w, before)
    whole.backward(grad)
    assert torch.equal(torch.cat([each[0] for each in found], dim=1), whole)
    torch.testing.assert_close(torch.cat([each[1] for each in found], dim=1), leaf.grad)
    torch.testing.assert_close(sum(each[2] for each in found), w.grad)


@pytest.mark.parametrize("size", [2, 4])
def test_exchanges_are_each_others_inverse_and_transpose(size: int) -> None:
    x, y = torch.randn(2, 8, 16, 3), torch.randn(2, 8, 16, 3)

    def work(part: Part) -> tuple[Tensor, Tensor]:
        piece = x[:, :, part.rows].clone().requires_grad_()
        heads = part.to_heads(piece)
        assert torch.equal(heads, x[:, part.heads(8)])
        assert torch.equal(part.to_positions(heads), piece)
        heads.backward(y[:, part.heads(8)])
        assert torch.equal(part.gather(x[0, 0, part.rows, :1].T), x[0, 0, :, :1].T)
        return piece.grad, y[:, :, part.rows]  # type: ignore[return-value]

    for grad, expected in in_parts(size, 16, work):
        assert torch.equal(grad, expected)


def test_one_of_many_by_itself() -> None:
    """`Loopback` runs the work of one process, with numbers of its own."""
    model = Reformer(CONFIG)
    tokens, labels = batch()
    for rank in (0, 3):
        part = Part(rank, 4, LENGTH, Loopback())
        loss = model.loss(tokens[:, part.rows], labels[:, part.rows], part=part)
        loss.backward()
        assert loss.isfinite() and all(grad.isfinite().all() for grad in gradients(model).values())


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"250 positions cannot be cut into 4 equal parts: pad it to a multiple of 4"
    ):
        Part(0, 4, 250, Loopback())
    part = Part(0, 8, LENGTH, Loopback())
    with pytest.raises(ValueError, match="4 heads cannot be shared by 8 processes"):
        Reformer(CONFIG)(batch()[0][:, part.rows], part=part)
    with pytest.raises(ValueError, match=r"256 tokens are not part 0 of 8 of a sequence of 256"):
        Reformer(CONFIG)(batch()[0], part=part)


@dataclass
class Counted:
    """An exchange that counts the numbers it sends to others."""

    rank: int
    inner: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
    sent: list[int] = field(default_factory=list)

    def __call__(self, sent: Tensor, counts_sent: Sequence[int], counts: Sequence[int]) -> Tensor:
        width = sent[:1].numel() if sent.shape[0] else 0
        self.sent.append(width * (sum(counts_sent) - counts_sent[self.rank]))
        return self.inner(sent, counts_sent, counts)


@pytest.mark.parametrize(("layer", "exchanged"), [("lsh", 9), ("full", 12), ("performer", 12)])
def test_how_much_is_exchanged(layer: str, exchanged: int) -> None:
    """The table in docs/scale.md."""
    more = {"conv": 0, "values_ahead": False, "positions": "none"}
    config = dataclasses.replace(CONFIG, layers=[layer], depth=1, **more)
    tokens, labels = batch()
    model = Reformer(config)

    def work(part: Part) -> int:
        counted = Counted(part.rank, part.exchange)
        own, part = copy.deepcopy(model), dataclasses.replace(part, exchange=counted)
        own.loss(tokens[:, part.rows], labels[:, part.rows], part=part).backward()
        return sum(counted.sent)

    positions = 2 * LENGTH // 4
    assert in_parts(4, LENGTH, work) == [exchanged * positions * config.dim * 3 // 4] * 4
