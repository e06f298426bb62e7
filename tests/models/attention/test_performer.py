"""Performer attention against the same features written out, and against the softmax that they estimate."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megabase.models import Reformer, Seeds
from megabase.models.attention import full_attention, performer_attention, performer_features
from megabase.models.attention.performer import PerformerAttention
from megabase.models.attention.performer_features import draw_directions
from megabase.models.config import ConfigError, PerformerConfig, ReformerConfig
from tests.models.attention import model_checks
from tests.quick import slow

CPU = torch.device("cpu")


def inputs(batch=2, heads=2, length=50, d=8, seed=0, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, length, d, generator=generator, dtype=dtype).requires_grad_()
        for _ in range(3)
    ]


def log_features(x: Tensor, directions: Tensor) -> Tensor:
    """log φ(x) of lemma 1, for vectors whose product is to be q · k / √d."""
    x = x * x.shape[-1] ** -0.25
    return x @ directions.to(x.dtype).mT - x.square().sum(-1, keepdim=True) / 2


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    causal: bool,
    mask: Tensor | None = None,
    own: bool = True,
) -> Tensor:
    """Weights of pairs from their features, all (batch, heads, length, length, features) in memory."""
    pairs = log_features(q, directions)[:, :, :, None] + log_features(k, directions)[:, :, None]
    scores = pairs.logsumexp(-1)
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = seen.tril(0 if own else -1) if causal else seen
    if mask is not None:
        seen = seen & mask[:, None, None] & mask[:, None, :, None]
    empty = ~seen.any(-1, keepdim=True)
    return (scores.masked_fill(~(seen | empty), -torch.inf).softmax(-1) @ v).masked_fill(empty, 0.0)


def masks(length: int) -> Tensor:
    """Real tokens: all; a prefix; every third; all but a long beginning."""
    place = torch.arange(length)
    return torch.stack((place >= 0, place < length // 2, place % 3 == 0, place >= 2 * length // 3))


@pytest.mark.parametrize(("causal", "own"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
def test_equals_the_same_features_written_out(causal, own, masked, length, monkeypatch):
    monkeypatch.setattr(performer_features, "CHUNK", 16)
    tensors = inputs(batch=4, length=length)
    directions = draw_directions(2, 12, 8, 1, CPU)
    mask = masks(length) if masked else None
    ours = performer_attention(*tensors, directions, causal=causal, own=own, mask=mask)
    expected = written_out(*tensors, directions, causal, mask, own)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("causal", "own"), [slow((True, True)), slow((True, False)), (False, True)])
def test_gradients_equal_finite_differences(causal, own, monkeypatch):
    monkeypatch.setattr(performer_features, "CHUNK", 4)
    tensors = inputs(batch=4, heads=1, length=6, d=2, dtype=torch.float64)
    directions = draw_directions(1, 5, 2, 1, CPU)
    for mask in (None, masks(6)):
        assert torch.autograd.gradcheck(
            lambda q, k, v, mask=mask: performer_attention(
                q, k, v, directions, causal=causal, own=own, mask=mask
            ),
            tensors,
        )


@pytest.mark.parametrize("causal", [True, False])
def test_more_features_approach_softmax(causal):
    q, k, v = inputs(length=40)
    # An estimate's variance grows like e^|q + k|²: with short vectors few features show the trend.
    q, k = 0.5 * q, 0.5 * k
    full = full_attention(q, k, v, causal=causal)
    errors = []
    for features in (16, 128, 1024, 8192):
        runs = [
            performer_attention(q, k, v, draw_directions(2, features, 8, seed, CPU), causal=causal)
            for seed in range(4)
        ]
        errors.append(sum((run - full).square().mean().sqrt().item() for run in runs) / 4)
    print("rms error at 16, 128, 1024, 8192 features:", [round(e, 4) for e in errors])
    # The error falls with the square root: about 2.8 times from one to the next.
    assert all(2 < more / less < 4 for more, less in itertools.pairwise(errors))
    assert errors[-1] < 0.02


def test_features_estimate_the_kernel_without_bias():
    q, k = (0.7 * torch.randn(30, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    draws = draw_directions(20_000, 8, 8, 3, CPU)
    estimates = (log_features(q, draws) + log_features(k, draws)).exp().mean(-1)
    error = estimates.mean(0) - (q * k / 8**0.5).sum(-1).exp()
    assert (error.abs() < 4.5 * estimates.std(0) / 20_000**0.5).all()
    independent = torch.randn(20_000, 8, 8, generator=torch.Generator().manual_seed(4))
    independent = (log_features(q, independent) + log_features(k, independent)).exp().mean(-1)
    print("variance, orthogonal over independent:", (estimates.var(0) / independent.var(0)).mean().item())
    assert (estimates.var(0) / independent.var(0)).mean() < 0.95


def test_directions_are_normal_and_orthogonal_within_a_block():
    directions = draw_directions(3000, 20, 8, 5, CPU)
    assert directions.shape == (3000, 20, 8)
    assert directions.mean((0, 1)).abs().max() < 4.5 / (3000 * 20) ** 0.5
    assert directions.square().mean().item() == pytest.approx(1.0, rel=0.01)
    for block in (directions[:, :8], directions[:, 8:16], directions[:, 16:]):
        products = block @ block.mT
        assert (products - products.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 1e-4
    assert (directions[:, :8] @ directions[:, 8:16].mT).abs().max() > 1


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.0), (1.0, 30.0), (30.0, 1.0), (30.0, 0.01)])
def test_causal_attention_depends_on_nothing_later(before, after):
    """At any norm: features of keys of norm 30 are e^-100 of those of norm 1 that may follow in the same chunk."""
    length, start = 300, 140
    q, k, v = inputs(batch=1, length=length, d=16)
    q, k = before * q, before * k
    directions = draw_directions(2, 32, 16, 1, CPU)
    out = performer_attention(q, k, v, directions, causal=True)[:, :, :start]
    changed = [x.clone() for x in (q, k, v)]
    for x, other in zip(changed, inputs(batch=1, length=length, d=16, seed=9), strict=True):
        x[:, :, start:] = after * other[:, :, start:]
    for tensors in (changed, [x[:, :, :start] for x in (q, k, v)]):
        # Exponents of large vectors are thousands, whose last bits are 1e-4.
        torch.testing.assert_close(
            performer_attention(*tensors, directions, causal=True)[:, :, :start],
            out,
            atol=1e-5 * before,
            rtol=1e-5,
        )


@pytest.mark.parametrize("causal", [True, False])
def test_large_and_small_vectors_side_by_side_equal_the_features_written_out(causal, monkeypatch):
    monkeypatch.setattr(performer_features, "CHUNK", 16)
    q, k, v = inputs(dtype=torch.float64)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    size = torch.logspace(-1, 1, 50, dtype=torch.float64)[order, None]
    q, k = (q * size).detach().requires_grad_(), (k * size.flip(0)).detach().requires_grad_()
    directions = draw_directions(2, 12, 8, 1, CPU)
    ours = performer_attention(q, k, v, directions, causal=causal)
    expected = written_out(q, k, v, directions, causal)
    torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-8)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("causal", [True, False])
def test_vectors_of_any_norm_give_numbers(causal):
    q, k, v = inputs(length=200)
    directions = draw_directions(2, 32, 8, 1, CPU)
    # Norms from almost nothing to hundreds, side by side: exponents of -10^4 beside 0.
    size = torch.logspace(-2, 2.5, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(2))]
    out = performer_attention(q * size[:, None], k * size.flip(0)[:, None], v, directions, causal=causal)
    # Weights are at least zero and sum to one: nothing leaves the range of the values.
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * 1.0001
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_of_padding_is_zero_and_has_no_gradients(causal):
    q, k, v = inputs()
    mask = torch.tensor([[True], [False]]).expand(2, 50)
    scaled = 50 * q  # exponents far beyond what fp32 can raise e to
    out = performer_attention(scaled, k, v, draw_directions(2, 16, 8, 1, CPU), causal=causal, mask=mask)
    assert not out[1].any()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.isfinite().all()
        assert not grad[1].any()
        assert grad[0].any()


@pytest.mark.parametrize("causal", [True, False])
def test_bf16_differs_by_its_rounding(causal):
    tensors = inputs(length=200, d=16)
    directions = draw_directions(2, 64, 16, 1, CPU)
    exact = performer_attention(*tensors, directions, causal=causal)
    low = [x.detach().bfloat16().requires_grad_() for x in tensors]
    out = performer_attention(*low, directions, causal=causal)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)
    grad = torch.randn_like(exact)
    for a, b in zip(
        torch.autograd.grad(out, low, grad.bfloat16()),
        torch.autograd.grad(exact, tensors, grad),
        strict=True,
    ):
        assert (a.float() - b).norm() < 0.03 * b.norm()


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("causal", [True, False])
def test_memory_is_length_times_dim(causal):
    length, d, features = 4096, 16, 64
    tensors = inputs(batch=1, heads=1, length=length, d=d)
    directions = draw_directions(1, features, d, 1, CPU)
    with Largest() as largest:
        out = performer_attention(*tensors, directions, causal=causal)
        out.sum().backward()
    assert largest.elements == length * d < length * features
    kept = out.grad_fn.units if causal else [out.grad_fn.sums.values]  # type: ignore[union-attr]
    assert sum(x.numel() for x in kept) <= length * features / 64


def layer(number: int = 0, **settings: int) -> PerformerAttention:
    config = ReformerConfig(
        vocab_size=9,
        dim=16,
        heads=2,
        layers=["performer"],
        performer=PerformerConfig(features=12, **settings),
    )
    config.validate()
    return PerformerAttention(config, number)


def test_directions_are_a_function_of_seed_step_and_layer():
    this = layer(redraw_every=10)
    first = this.directions(Seeds(1, 20), CPU)
    state = torch.get_rng_state()
    draw_directions.cache_clear()
    assert torch.equal(this.directions(Seeds(1, 29), CPU), first)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first[0], first[1])
    for seeds in (Seeds(1, 30), Seeds(2, 20)):
        assert not torch.equal(this.directions(seeds, CPU), first)
    assert not torch.equal(layer(1, redraw_every=10).directions(Seeds(1, 20), CPU), first)
    always = layer(redraw_every=0)
    assert torch.equal(always.directions(Seeds(1, 0), CPU), always.directions(Seeds(1, 10**6), CPU))


def test_directions_first_drawn_for_inference_serve_training_too():
    draw_directions.cache_clear()
    with torch.inference_mode():
        directions = draw_directions(2, 12, 8, 77, CPU)
    tensors = inputs()
    performer_attention(*tensors, directions, causal=True).sum().backward()
    assert tensors[0].grad is not None


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((3, 12, 8), None, r"directions have shape \(3, 12, 8\)"),
        ((2, 12, 4), None, r"\(2, any, 8\)"),
        ((12, 8), None, "heads, features, head_dim"),
        ((2, 12, 8), torch.ones(2, 50), "mask is torch.float32"),
        ((2, 12, 8), torch.ones(2, 49, dtype=torch.bool), r"shape \(2, 50\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, mask, message):
    with pytest.raises(ConfigError, match=message):
        performer_attention(*inputs(), torch.zeros(shape), causal=True, mask=mask)


# In a model


MODEL = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=3,
    heads=2,
    layers=["performer"],
    conv=3,
    dropout=0.1,
    performer=PerformerConfig(features=12),
)
every_config = pytest.mark.parametrize(
    "config", [MODEL, dataclasses.replace(MODEL, causal=False)], ids=["causal", "bidirectional"]
)


@every_config
@pytest.mark.parametrize("precision", [slow("fp32"), slow("bf16"), "autocast"])
def test_the_reversible_pass_equals_ordinary_autograd(config, precision):
    model_checks.check_equal_to_ordinary_autograd(config, precision)


@every_config
def test_each_parameter_gets_one_gradient(config):
    model_checks.check_one_gradient_for_each_parameter(config)


@pytest.mark.slow
@every_config
def test_the_pass_is_a_function_of_weights_tokens_and_seeds(config):
    model_checks.check_function_of_weights_tokens_and_seeds(config)


@every_config
def test_padding_changes_nothing_for_real_tokens(config):
    model_checks.check_padding_changes_nothing(config, any_length=True)


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_a_model_is_causal(positions):
    model = Reformer(dataclasses.replace(MODEL, positions=positions)).eval()
    x = model_checks.tokens()
    changed = torch.cat((x[:, :30], model_checks.tokens(seed=1)[:, 30:]), dim=1)
    logits = model(x)
    for other in (changed, x[:, :30]):
        torch.testing.assert_close(model(other)[:, :30], logits[:, :30], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(changed)[:, 30:], logits[:, 30:], atol=1e-2)
