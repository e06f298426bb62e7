"""The elementwise Triton kernels against plain torch, compiled or interpreted (see interpreted.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.models import Reformer, ReformerConfig, Seeds, fused, streams
from megabase.models.attention import by_heads
from megabase.models.chance import _quantiles, dropout, normals, random_bits
from megabase.models.layers import _Convolve
from megabase.models.positions import rotary
from megabase.models.streams import LIMIT, SCALE, FixedPoint
from tests.models.interpreted import CAN_RUN_KERNELS, DEVICE, GPU, run_interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
fused_chance = pytest.importorskip("megabase.models.fused.chance")

HALVES = (torch.bfloat16, torch.float16)
# One rounding of the result, or of a sum of many terms.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)

needs_kernels = pytest.mark.skipif(not CAN_RUN_KERNELS, reason="runs in test_interpreted's process")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(CAN_RUN_KERNELS, reason="the kernels run in this process")
def test_interpreted(tmp_path):
    run_interpreted(__file__, tmp_path)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of dtype, measured by norms."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).norm()
    assert error <= TOLERANCE[dtype] * expected.double().norm().clamp_min(1.0), error


def gradients(function: Any, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients of all tensors."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@needs_kernels
class TestStreams:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [1, 100, 5000])
    def test_equal_plain_torch(self, n, dtype):
        branch = draw(n, seed=n, dtype=dtype) * 100
        stream = torch.randint(-(2**30), 2**30, (n,), dtype=torch.int32, device=DEVICE)
        encoded = FixedPoint.encode(branch.cpu()).to(DEVICE)
        invalid = torch.zeros((), device=DEVICE)
        assert torch.equal(fused.add_to_stream(None, branch, 1, SCALE, LIMIT, invalid), encoded)
        after = fused.add_to_stream(stream, branch, 1, SCALE, LIMIT, invalid)
        assert torch.equal(after, stream + encoded)
        assert torch.equal(fused.add_to_stream(after, branch, -1, SCALE, LIMIT, None), stream)
        assert torch.equal(fused.decode(stream, 1 / SCALE), stream.float() / SCALE)
        # A stream of 2^30 units is at the limit.
        assert invalid.isnan() == (after.abs() >= LIMIT * SCALE).any()

    def test_halves_round_to_even_and_large_numbers_saturate(self):
        units = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, -0.51, 8388607.5, 8388609.0, 1e30, -1e30, 2.0**31]
        x = torch.tensor(units, device=DEVICE, dtype=torch.float64).float() / SCALE
        expected = FixedPoint.encode(x.cpu()).to(DEVICE)
        assert torch.equal(fused.add_to_stream(None, x, 1, SCALE, LIMIT, None), expected)

    def test_subtraction_undoes_an_addition_that_wraps(self):
        stream = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32, device=DEVICE)
        branch = torch.tensor([3.0, -3.0], device=DEVICE)
        after = fused.add_to_stream(stream, branch, 1, SCALE, LIMIT, None)
        assert torch.equal(fused.add_to_stream(after, branch, -1, SCALE, LIMIT, None), stream)

    @pytest.mark.parametrize(
        ("value", "stream_value"),
        [(0.0, 0), (LIMIT, 0), (-LIMIT, 0), (float("nan"), 0), (float("inf"), 0), (0.0, 2**30)],
    )
    def test_invalid_becomes_nan_beyond_the_limit(self, value, stream_value):
        """At the limit, beyond it, or NaN: the same as without a GPU."""
        branch = torch.zeros(3000, device=DEVICE)
        stream = torch.zeros(3000, dtype=torch.int32, device=DEVICE)
        branch[2500], stream[17] = value, stream_value
        invalid, plain = torch.zeros((), device=DEVICE), torch.zeros(())
        fused.add_to_stream(stream, branch, 1, SCALE, LIMIT, invalid)
        FixedPoint.add_(stream.cpu(), branch.cpu(), plain)
        assert invalid.isnan() == plain.isnan() == bool(value or stream_value)

    def test_decoding_does_not_depend_on_the_default_dtype(self):
        stream = torch.tensor([123456789], dtype=torch.int32, device=DEVICE)
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert fused.decode(stream, 1 / SCALE).item() == pytest.approx(123456789 / SCALE, rel=1e-7)
        finally:
            torch.set_default_dtype(torch.float32)


class FusedNorm(torch.autograd.Function):
    """The kernels of the norm as `models/norm.py` uses them on a GPU."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return fused.normalised(x.flatten(0, -2), 1.0, weight, bias, 1e-6).view(x.shape)

    @staticmethod
    def backward(ctx, *grads):
        x, weight, bias = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grads[0].flatten(0, -2)
        grad_x, sums = fused.norm_gradients(rows, 1.0, weight, bias, 1e-6, grad)
        of_weight, of_bias = sums.to(weight.dtype)
        return grad_x.view(x.shape), of_weight, None if bias is None else of_bias


def test_empty_inputs():
    if not CAN_RUN_KERNELS:
        pytest.skip("runs in test_interpreted's process")
    empty, weight = torch.empty(0, 4, 8, device=DEVICE), draw(8)
    assert fused.add_to_stream(None, empty, 1, SCALE, LIMIT, None).shape == (0, 4, 8)
    for function in (
        lambda x, w: FusedNorm.apply(x, w, None),
        lambda x, w: fused.convolve(x, w[None], 0),
    ):
        out, grad_x, grad_weight = gradients(function, [empty, weight], torch.empty_like(empty))
        assert out.shape == grad_x.shape == empty.shape
        assert torch.equal(grad_weight, torch.zeros_like(weight))


@needs_kernels
class TestNorm:
    @pytest.mark.parametrize("layer", [True, False])
    @pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (70, 64), (33, 96), (5, 1500)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_plain_torch(self, rows, width, layer, dtype):
        """x is fp32, as streams are; weights and result of a dtype."""
        x = draw(2, rows, width, seed=1) * 3 + 1
        weight, bias = draw(width, seed=2, dtype=dtype), draw(width, seed=3, dtype=dtype)
        grad = draw(2, rows, width, seed=4, dtype=dtype)

        def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if bias is None:
                return F.rms_norm(x, (width,), weight, 1e-6)
            return F.layer_norm(x, (width,), weight, bias, 1e-6)

        def fused_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return FusedNorm.apply(x, weight, bias)

        tensors = [x, weight, bias] if layer else [x, weight]
        got = gradients(fused_norm, tensors, grad)
        expected = gradients(plain, [t.double() for t in tensors], grad)
        assert [t.dtype for t in got] == [dtype, torch.float32, dtype, dtype][: len(got)]
        if width == 1 and layer:
            expected[1] = torch.zeros_like(expected[1])  # only eps remains of it
            got[1] = got[1] * 0
        for a, b, kind in zip(got, expected, [dtype, torch.float32, dtype, dtype], strict=False):
            close(a, b, kind)

    def test_reads_a_stream_in_fixed_point(self):
        x, weight, grad = draw(20, 16), draw(16, seed=1), draw(20, 16, seed=2)
        stream = FixedPoint.encode(x.cpu()).to(DEVICE)
        floats = FixedPoint.decode(stream.cpu()).to(DEVICE)
        one, other = (
            (
                fused.normalised(x, unit, weight, None, 1e-6),
                *fused.norm_gradients(x, unit, weight, None, 1e-6, grad),
            )
            for x, unit in ((stream, 1 / SCALE), (floats, 1.0))
        )
        assert all(map(torch.equal, one, other))

    def test_many_rows_have_one_order_of_sums(self, monkeypatch):
        x, weight, grad = draw(300, 16), draw(16, seed=1), draw(300, 16, seed=2)
        from megabase.models.fused import blocks

        monkeypatch.setattr(blocks, "BLOCK", 64)
        monkeypatch.setattr(blocks, "PROGRAMS", 7)
        got = [gradients(lambda x, w: FusedNorm.apply(x, w, None), [x, weight], grad) for _ in range(2)]
        assert all(map(torch.equal, *got))
        expected = gradients(lambda x, w: F.rms_norm(x, (16,), w, 1e-6), [x.double(), weight.double()], grad)
        for a, b in zip(got[0], expected, strict=True):
            close(a, b, torch.float32)


@needs_kernels
class TestDropout:
    # Below 2^32 places, across them, and beyond: a place has more bits than a counter.
    @pytest.mark.parametrize("start", [0, 7, (1 << 32) // 50 - 20, 1 << 34])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_plain_torch(self, dtype, start):
        """The same numbers are dropped, forward and backward, and the others are rounded alike."""
        x, grad = draw(3, 50, 50, dtype=dtype), draw(3, 50, 50, seed=1, dtype=dtype)
        keys = torch.tensor([0, -5, 2**61 + 12345], device=DEVICE)
        got = gradients(lambda x: fused.dropout(x, 0.3, keys, start * 50), [x], grad)
        expected = gradients(lambda x: dropout(x, 0.3, keys.cpu(), start), [x.cpu()], grad.cpu())
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.cpu() == 0.0, b == 0.0)
            if GPU or dtype != torch.bfloat16:  # the interpreter truncates to bf16 instead of rounding
                assert torch.equal(a.cpu(), b)

    def test_keys_are_saved_instead_of_a_mask(self):
        kept = []
        x = draw(2, 64).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            fused.dropout(x, 0.5, torch.tensor([1, 2], device=DEVICE))
        assert kept == [2]


@needs_kernels
class TestRotary:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("d", "start"), [(2, 0), (24, 3), (64, 1000)])
    def test_equals_plain_torch(self, d, start, dtype):
        x = draw(2, 9, 3, d, dtype=dtype).transpose(1, 2)
        grad = draw(2, 3, 9, d, seed=1, dtype=dtype)
        cos, sin = angles(9, d, start)

        def plain(x: Tensor) -> Tensor:
            return rotary(x.cpu().double(), start).to(x.device)

        got = gradients(lambda x: fused.turn(x, cos.to(dtype), sin.to(dtype)), [x], grad)
        for a, b in zip(got, gradients(plain, [x], grad), strict=True):
            close(a, b, dtype if dtype in HALVES else torch.float32)
        assert got[0].stride() == x.stride()

    @pytest.mark.parametrize("dim", [0, 1, 2])
    def test_places_beyond_31_bits(self, dim):
        """Three rows, 2^30 numbers from each to the next; memory between them is reserved and never touched."""
        shape, strides = [1, 1, 1, 16], [16, 16, 16, 1]
        shape[dim], strides[dim] = 3, 2**30
        x = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=DEVICE).as_strided(shape, strides)
        rows = draw(*shape, dtype=torch.bfloat16)
        x.copy_(rows)
        cos, sin = (each.to(torch.bfloat16) for each in angles(shape[2], 16, start=5))
        assert torch.equal(fused.turn(x, cos, sin), fused.turn(rows, cos, sin))


def angles(length: int, d: int, start: int) -> tuple[Tensor, Tensor]:
    """cos and sin as positions.rotary computes them, read from a unit vector that it rotates."""
    unit = torch.cat([torch.ones(length, d // 2), torch.zeros(length, d // 2)], dim=-1).double()
    turned = rotary(unit, start).to(DEVICE, torch.float32)
    return turned[:, : d // 2].contiguous(), turned[:, d // 2 :].contiguous()


@needs_kernels
class TestConvolution:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("taps", "before"), [(1, 0), (3, 2), (4, 3), (5, 2)])
    @pytest.mark.parametrize(("length", "width"), [(1, 3), (40, 130)])
    def test_equals_plain_torch(self, length, width, taps, before, dtype):
        x, grad = draw(2, length, width, dtype=dtype), draw(2, length, width, seed=1, dtype=dtype)
        weight = draw(taps, width, seed=2, dtype=dtype)
        got = gradients(lambda x, w: fused.convolve(x, w, before), [x, weight], grad)
        expected = gradients(
            lambda x, w: _Convolve.apply(x, w, before), [x.cpu().double(), weight.cpu().double()], grad.cpu()
        )
        for a, b in zip(got, expected, strict=True):
            close(a.cpu(), b, dtype)

    def test_programs_share_the_tokens(self, monkeypatch):
        from megabase.models.fused import blocks

        monkeypatch.setattr(blocks, "PROGRAMS", 2)
        self.test_equals_plain_torch(90, 8, 4, 3, torch.float32)


def hash_counters(counters, keys, result, N: tl.constexpr):
    """A kernel: hash N counters, each with its key."""
    place = tl.arange(0, N)
    key = tl.load(keys + place)
    bits = fused_chance.random_bits(
        tl.load(counters + place).to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32)
    )
    tl.store(result + place, bits.to(tl.int32, bitcast=True))


@needs_kernels
def test_the_hash_of_the_device_equals_that_of_torch():
    """fused.chance.random_bits mirrors chance.random_bits, for every half of the key and every counter."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (1024,), generator=generator, dtype=torch.int64)
    counters = torch.randint(-(2**31), 2**31, (1024,), generator=generator).to(torch.int32)
    keys[:4], counters[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)]), torch.tensor([0, 1, -1, 2**31 - 1])
    result = torch.empty(1024, dtype=torch.int32, device=DEVICE)
    triton.jit(hash_counters)[(1,)](counters.to(DEVICE), keys.to(DEVICE), result, N=1024)
    assert torch.equal(result.cpu(), random_bits(keys, counters))


@needs_kernels
@pytest.mark.parametrize("key", [0, 5, -1, 2**62 + 987654321])
def test_normals_equal_plain_torch(key):
    plain = normals(key, 5000)
    assert torch.equal(fused.normals(key, 5000, _quantiles(DEVICE)).cpu(), plain)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_streams_in_host_memory_give_the_same_bits(groups, dtype, monkeypatch):
    torch.manual_seed(0)
    model = Reformer(ReformerConfig(vocab_size=9, dim=64, depth=3, heads=4, dropout=0.1)).to("cuda", dtype)
    tokens = torch.randint(5, 9, (2, 301), device="cuda")
    monkeypatch.setattr(streams, "MOVED", 1000)
    monkeypatch.setitem(by_heads.LIMIT, "cuda", 2 * 300 * 64 // groups)
    found = []
    for offload in (False, True):
        model.body.stack.offload = offload
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], seeds=Seeds(3, 4))
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()})
        model.zero_grad()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
