"""Encoder and decoder: equality with ordinary autograd, masks, generation, and a task that they learn."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from megabase.models import (
    ConfigError,
    EncoderDecoder,
    FeedForwardConfig,
    LocalConfig,
    LSHConfig,
    Reformer,
    ReformerConfig,
    Seeds,
    generate,
)
from megabase.models.call import Call
from megabase.models.chance import Purpose
from megabase.models.generation import read, read_block, start
from megabase.models.reversible import Block, ReversibleStack
from megabase.models.streams import decoded
from tests.models.backward import assert_same_bits, gradients, kept_for_backward
from tests.quick import slow

DECODER = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=3,
    heads=2,
    layers=["local", "lsh", "full"],
    lsh=LSHConfig(rounds=2, chunk_length=8, n_buckets=4),
    local=LocalConfig(window=8),
    feedforward=FeedForwardConfig(mult=2.0),
)
ENCODER = dataclasses.replace(DECODER, vocab_size=12, dim=12, depth=2, causal=False)
SEEDS = Seeds(run=3, step=5, samples=torch.tensor([11, 4]))


def build(dtype: torch.dtype = torch.float32, depth: int = 3, **options) -> EncoderDecoder:
    torch.manual_seed(0)
    encoder = dataclasses.replace(ENCODER, **options)
    return EncoderDecoder(encoder, dataclasses.replace(DECODER, depth=depth, **options)).to(dtype)


def batch(length: int = 30, source_length: int = 41) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """source, tokens, labels, source_mask, mask."""
    generator = torch.Generator().manual_seed(7)
    source = torch.randint(0, 12, (2, source_length), generator=generator)
    tokens = torch.randint(0, 9, (2, length), generator=generator)
    source_mask = torch.arange(source_length) < torch.tensor([[source_length], [source_length * 2 // 3]])
    mask = torch.arange(length) < torch.tensor([[length * 2 // 3], [length]])
    return source, tokens, tokens.roll(-1, 1).masked_fill(~mask, -100), source_mask, mask


def run(model: EncoderDecoder, *, reverse: bool, masked: bool = True) -> Tensor:
    source, tokens, labels, source_mask, mask = batch()
    masks = {"source_mask": source_mask, "mask": mask} if masked else {}
    return model.head(model.decode(source, tokens, seeds=SEEDS, reverse=reverse, **masks), labels)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("depth", [slow(1), 3, slow(12)])
def test_equals_ordinary_autograd_bit_for_bit(depth, precision, dropout, masked):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build(dtype, depth, dropout=dropout, attention_dropout=dropout)
    results = []
    for reverse in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = run(model, reverse=reverse, masked=masked)
        loss.backward()
        results.append((loss, gradients(model)))
    (loss, found), (expected_loss, expected) = results
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected_loss)
    assert_same_bits(found, expected)
    assert all(grad.abs().sum() > 0 for grad in found.values())


def test_the_encoder_gets_the_sum_of_the_blocks_gradients():
    """In fp64, against a plain two-stream network that is written out here."""
    model = build(torch.float64, residual="float")
    source, tokens, labels, _, _ = batch()
    context = model.encode(source).detach().requires_grad_()
    hidden = model.decoder(tokens, context=context, seeds=Seeds().apart(Purpose.DECODER))
    model.head(hidden, labels).backward()

    plain = context.detach().clone().requires_grad_()
    call = Call(Seeds().apart(Purpose.DECODER), context=plain)
    one = two = model.decoder.embedding(tokens, call)
    for branch in model.decoder.stack.branches:
        one, two = two, one + branch(two, call)
    logits = model.head(model.decoder.norm(torch.cat((one, two), dim=-1)))
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    # Streams are fp32 here and fp64 there.
    torch.testing.assert_close(context.grad, plain.grad, atol=1e-5, rtol=1e-4)
    assert plain.grad.abs().max() > 0.01


def test_sums_over_blocks_are_fp32_where_the_context_is_bf16():
    """300 blocks add the same gradient to a context: sums in bf16 would stop growing at 256."""

    class Reads(nn.Module):
        def forward(self, x: Tensor, call: Call) -> Tensor:
            assert call.context is not None
            return call.context.to(torch.bfloat16) + 0 * decoded(x, call.source).to(torch.bfloat16)

    class Nothing(nn.Module):
        def forward(self, x: Tensor, call: Call) -> Tensor:
            return 0 * decoded(x, call.source)

    stack = ReversibleStack(Block(Nothing(), Nothing(), Reads()) for _ in range(300))
    for reverse in (True, False):
        context = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
        out = stack(torch.zeros(1, 1, 1), Call(context=context), reverse=reverse)
        out.sum().backward()
        assert context.grad.item() == 300


def test_freezing_the_encoder_changes_no_gradient_of_the_decoder():
    model = build()
    run(model, reverse=True).backward()
    expected = gradients(model)
    model.encoder.requires_grad_(False)
    for reverse in (True, False):
        run(model, reverse=reverse).backward()
        for name, p in model.named_parameters():
            assert p.grad is None if name.startswith("encoder") else torch.equal(p.grad, expected[name])
        model.zero_grad()


def test_a_frozen_decoder_passes_gradients_to_the_encoder():
    model = build()
    run(model, reverse=True).backward()
    expected = gradients(model)
    model.decoder.requires_grad_(False)
    run(model, reverse=True).backward()
    assert all(torch.equal(p.grad, expected[f"encoder.{n}"]) for n, p in model.encoder.named_parameters())


def test_two_backward_passes_through_one_graph_and_two_forward_passes_before_a_backward_pass():
    model = build(dropout=0.1)
    loss = run(model, reverse=True)
    loss.backward(retain_graph=True)
    first = gradients(model)
    other = run(model, reverse=True)
    loss.backward()
    assert_same_bits(first, gradients(model))
    other.backward()
    assert_same_bits(first, gradients(model))


def saved_elements(model: EncoderDecoder, *, reverse: bool) -> int:
    return sum(x.numel() for x in kept_for_backward(model, lambda: run(model, reverse=reverse)))


def test_memory_kept_for_backward_does_not_grow_with_depth():
    kept = [saved_elements(build(depth=depth), reverse=True) for depth in (1, 6, 24)]
    assert kept[0] == kept[1] == kept[2]
    assert saved_elements(build(depth=6), reverse=False) > 5 * kept[1]


def test_hooks_of_parameters_fire_once_each():
    model = build()
    fired: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    run(model, reverse=True).backward()
    assert sorted(fired) == sorted(name for name, _ in model.named_parameters())


def test_padding_changes_nothing_for_real_tokens():
    model = build().eval()
    source, tokens, labels, source_mask, mask = batch()
    logits = model(source, tokens, source_mask=source_mask, mask=mask)
    random_tokens = torch.randint(0, 12, source.shape)
    other = model(
        source.where(source_mask, random_tokens),
        tokens.where(mask, random_tokens[:, :30] % 9),
        source_mask=source_mask,
        mask=mask,
    )
    torch.testing.assert_close(logits[mask], other[mask], atol=1e-5, rtol=1e-5)
    for row in range(2):
        n, source_n = mask[row].sum(), source_mask[row].sum()
        alone = model(source[row : row + 1, :source_n], tokens[row : row + 1, :n])
        torch.testing.assert_close(logits[row, :n], alone[0], atol=1e-4, rtol=1e-4)
    loss = model.loss(source, tokens, labels, source_mask=source_mask, mask=mask)
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, nats)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_source_without_real_tokens_is_read_as_zeros(rate):
    model = build(attention_dropout=rate)
    source, tokens, labels, source_mask, _ = batch()
    source_mask[1] = False
    loss = model.loss(source, tokens, labels, source_mask=source_mask)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    other = model.loss(source.flip(1), tokens, labels, source_mask=source_mask.flip(1))
    assert not torch.equal(loss, other)


def test_the_decoder_is_causal_and_reads_the_whole_source():
    model = build().eval()
    source, tokens, *_ = batch()
    logits = model(source, tokens)
    later = tokens.clone()
    later[:, 20:] = (tokens[:, 20:] + 1) % 9
    torch.testing.assert_close(model(source, later)[:, :20], logits[:, :20], atol=1e-4, rtol=1e-4)
    for place in (0, 40):
        other = source.clone()
        other[:, place] = (source[:, place] + 1) % 12
        assert ((model(other, tokens) - logits).abs().amax(-1) > 1e-4).all()


def test_encoder_and_decoder_share_no_random_numbers():
    seeds = Seeds(1, 2)
    assert seeds.apart(Purpose.DECODER) == seeds.apart(Purpose.DECODER)
    numbers = {
        s.number(purpose, layer)
        for s, purpose, layer in itertools.product(
            [seeds, seeds.apart(Purpose.DECODER), Seeds(1, 3).apart(Purpose.DECODER)], Purpose, range(3)
        )
    }
    assert len(numbers) == 3 * len(Purpose) * 3


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("prompt", [1, slow(17)])
def test_generation_equals_one_pass(prompt, masked):
    model = build(torch.float64, dropout=0.5).train()
    source, tokens, _, source_mask, _ = batch()
    source_mask = source_mask if masked else None
    state = start(model, 2, seeds=SEEDS, source=source, source_mask=source_mask)
    pieces = [tokens[:, :prompt], *tokens[:, prompt:].split(1, dim=1)]
    logits = torch.stack([read(model, piece, state) for piece in pieces], dim=1)
    expected = model.eval()(source, tokens, seeds=SEEDS, source_mask=source_mask)
    torch.testing.assert_close(logits, expected[:, prompt - 1 :], atol=1e-9, rtol=0)
    # In blocks, from forks of a state that has read the source.
    fork = start(model, 2, seeds=SEEDS, source=source, source_mask=source_mask).fork([1, 0])
    blocks = tokens[[1, 0]].tensor_split([prompt, prompt + 9], dim=1)
    found = torch.cat([read_block(model, block, fork).log_probs for block in blocks], dim=1)
    log_probs = expected.log_softmax(-1)[[1, 0], :-1].gather(2, tokens[[1, 0], 1:, None]).squeeze(2)
    torch.testing.assert_close(found[:, 1:], log_probs, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        ({"causal": True}, {}, "encoder has causal=True"),
        ({}, {"causal": False}, "decoder has causal=False"),
        ({"depth": 0}, {}, "depth=0"),
    ],
)
def test_configs_that_cannot_work_are_refused(encoder, decoder, message):
    with pytest.raises(ConfigError, match=message):
        EncoderDecoder(dataclasses.replace(ENCODER, **encoder), dataclasses.replace(DECODER, **decoder))


def test_calls_that_cannot_work_are_refused():
    model = build()
    source, tokens, *_ = batch()
    with pytest.raises(ValueError, match="source holds 1 sequences, tokens 2"):
        model(source[:1], tokens)
    with pytest.raises(ValueError, match="must be bool"):
        model(source, tokens, source_mask=torch.ones(2, 41))
    with pytest.raises(ValueError, match="no source for 2"):
        generate(model, tokens, 3)
    with pytest.raises(ValueError, match="for 2 sequences"):
        start(model, 2, source=source[:1])
    with pytest.raises(ConfigError, match=r"lsh\.attend=chunk"):
        start(build(lsh=LSHConfig(attend="chunk", n_buckets=4)), 2, source=source)
    with pytest.raises(ValueError, match="reads no source"):
        start(Reformer(DECODER), 2, source=source)


@pytest.mark.slow
@pytest.mark.parametrize("backwards", [False, True])
def test_learns_to_copy(backwards):
    """The target is the source, or the source backwards: only cross-attention can predict it."""
    torch.manual_seed(0)
    symbols, length = 16, 12
    decoder = ReformerConfig(
        vocab_size=symbols + 1,
        dim=64,
        depth=1,
        heads=4,
        layers=["lsh"],
        max_length=length,
        positions="learned",
        lsh=LSHConfig(rounds=2, chunk_length=8, n_buckets=2),
        feedforward=FeedForwardConfig(mult=2.0),
    )
    model = EncoderDecoder(dataclasses.replace(decoder, causal=False), decoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)

    def words(step: int) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.randint(1, symbols + 1, (32, length), generator=torch.Generator().manual_seed(step))
        target = source.flip(1) if backwards else source
        return source, nn.functional.pad(target[:, :-1], (1, 0)), target

    losses = []
    for step in range(320):
        source, tokens, labels = words(step)
        loss = model.loss(source, tokens, labels, seeds=Seeds(0, step)) / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) > 20 and max(losses[-20:]) < 0.1 * math.log(symbols):
            break
    end = sum(losses[-20:]) / 20
    print(f"nats per token at the start {losses[0]:.2f}, after {len(losses)} steps {end:.2f}")
    assert losses[0] == pytest.approx(math.log(symbols + 1), rel=0.2)
    assert end < 0.2 * math.log(symbols)
    source, tokens, target = words(1000)
    found = generate(model, tokens[:, :1], length, temperature=0.0, source=source)
    assert (found == target).float().mean() > 0.9
