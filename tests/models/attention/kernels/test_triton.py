"""The Triton kernels of attention against the reference, compiled or interpreted (see interpreted.py)."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megabase.models.attention.kernels import reference
from megabase.models.attention.kernels.dispatch import unit_keys
from megabase.models.attention.kernels.inputs import PairDropout, Rotations, Rule, SortedOrder
from megabase.models.attention.kernels.triton import host as kernels
from megabase.models.attention.lsh import draw_rotations, rotate_and_hash
from megabase.models.config import ConfigError
from tests.models.interpreted import CAN_RUN_KERNELS, DEVICE, GPU, ROOT, run_interpreted

pytest.importorskip("triton")

# The interpreter needs a fifth of a second for a block; compiling for a new width takes seconds.
WIDTHS = [(64, 64), (128, 128), (64, 24)] if GPU else [(16, 16), (32, 24), (24, 5), (5, 32)]
LENGTHS = [1, 7, 65, 130, 1000] if GPU else [1, 2, 7, 31, 64, 65, 130]
# fp32 reveals mistakes. In half precision the result is rounded before Σ grad · out is computed from it (as in
# FlashAttention): most of the error of q's gradient, where a query has few keys and their scores' gradients cancel.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.timeout(1800)
@pytest.mark.skipif(CAN_RUN_KERNELS, reason="the kernels run in this process")
@pytest.mark.slow
@pytest.mark.parametrize("which", ["not slow", "slow"])
def test_interpreted(which, tmp_path):
    run_interpreted(__file__, tmp_path, "-m", which, "-k", "not test_compiles")


class Case:
    """A random problem: q, k, v in a dtype, a sorted order, a rule, dropout."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        rows, rounds = rng.randint(1, 2), rng.choice([1, 2, 3])
        length = rng.choice(LENGTHS)
        d, d_v = rng.choice(WIDTHS)
        q, k, v = (torch.randn(rows, length, width, generator=generator) for width in (d, d, d_v))
        self.tensors: list[Tensor | None] = [x.to(DEVICE, dtype) for x in (q * d**-0.5, k, v)]
        mask = torch.rand(rows, length, generator=generator) < 0.7 if rng.random() < 0.4 else None
        local = rounds == 1 and rng.random() < 0.5
        n_buckets = 1 if local else rng.choice([1, 3, 8])
        buckets = torch.randint(0, n_buckets, (rows, rounds, length), generator=generator)
        order = SortedOrder.by_bucket(buckets.to(DEVICE), None if mask is None else mask.to(DEVICE))
        if local and mask is None:
            order = SortedOrder.identity(rows, length, DEVICE)
        rule = Rule(
            reach=rng.choice([1, 2, 5, 16, 40, 70, 300]),
            attend=rng.choice(["window", "chunk"]),
            causal=rng.random() < 0.5,
            once=not local and rng.random() < 0.5,
            own=rng.choice(["always", "never"] if local else ["always", "alone", "alone", "never"]),
        )
        keys = torch.randint(-(2**62), 2**62, (rows,), generator=generator).to(DEVICE)
        self.rest = order, rule, PairDropout(0.3, keys) if rng.random() < 0.3 else None
        self.grad = torch.randn(rows, length, d_v, generator=generator).to(DEVICE, dtype)
        if rng.random() < 0.4:
            # Keys are unit queries.
            self.tensors[0], self.tensors[1] = q.to(DEVICE, dtype), None

    def run(self, attention: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        """out and the gradients of q, k, v, computed in a dtype."""
        tensors = [
            x if x is None else x.to(dtype or x.dtype, copy=True).requires_grad_() for x in self.tensors
        ]
        out = attention(*tensors, *self.rest)
        given = [x for x in tensors if x is not None]
        return [out.detach(), *torch.autograd.grad(out, given, self.grad.to(out.dtype))]

    def check(self, attention: Any = kernels.sorted_attention) -> None:
        dtype = self.grad.dtype
        for number, (got, expected) in enumerate(
            zip(self.run(attention), self.run(plain, torch.float64), strict=True)
        ):
            assert got.dtype == dtype
            error = (got.double() - expected).norm().item()
            # A gradient may cancel to zero. Then its rounding is that of the terms that cancel.
            size = max(1.0, expected.norm().item(), self.grad.norm().item())
            assert error <= TOLERANCE[dtype] * size, (number, error, size, self.rest[1])


def plain(q: Tensor, k: Tensor | None, v: Tensor, *rest: Any) -> Tensor:
    return reference.sorted_attention(q, unit_keys(q) if k is None else k, v, *rest)


class TestSortedAttention:
    __test__ = CAN_RUN_KERNELS

    @pytest.mark.parametrize("seed", range(20))
    def test_equals_reference(self, seed):
        Case(seed, torch.float32).check()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("seed", range(100, 104))
    def test_equals_reference_in_half_precision(self, seed, dtype):
        Case(seed, dtype).check()

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("seed", range(200, 216))
    def test_equals_reference_in_many_cases(self, seed, dtype):
        Case(seed, dtype).check()

    @pytest.mark.parametrize("attend", ["window", "chunk"])
    @pytest.mark.parametrize("once", [False, True])
    def test_many_blocks_and_rounds(self, attend, once):
        case = Case(1, torch.float32)
        rows, length = 1, 150
        generator = torch.Generator().manual_seed(5)
        case.tensors = [torch.randn(rows, length, 16, generator=generator).to(DEVICE) for _ in range(3)]
        case.grad = torch.randn(rows, length, 16, generator=generator).to(DEVICE)
        buckets = torch.randint(0, 3, (rows, 3, length), generator=generator).to(DEVICE)
        case.rest = SortedOrder.by_bucket(buckets), Rule(48, attend, True, once, "alone"), None
        case.check()

    @pytest.mark.parametrize("seed", [3, 8])
    def test_the_same_input_gives_the_same_bits(self, seed):
        case = Case(seed, torch.bfloat16)
        for a, b in zip(case.run(kernels.sorted_attention), case.run(kernels.sorted_attention), strict=True):
            assert torch.equal(a, b)

    def test_rows_in_several_parts_give_the_same_bits(self, monkeypatch):
        from megabase.models.attention.kernels.triton import launch

        for case in (Case(seed, torch.float32) for seed in range(3, 30)):
            if len(case.grad) > 1 and case.rest[1].once:
                break
        together = case.run(kernels.sorted_attention)
        monkeypatch.setattr(launch, "PART", 1)
        for a, b in zip(case.run(kernels.sorted_attention), together, strict=True):
            assert torch.equal(a, b)

    def test_tables_may_have_any_integer_dtype(self):
        case = Case(2, torch.float32)
        order, *rest = case.rest
        short = case.run(kernels.sorted_attention)
        case.rest = (
            SortedOrder(*(x.long() for x in (order.positions, order.buckets, order.real_lengths))),
            *rest,
        )
        for a, b in zip(case.run(kernels.sorted_attention), short, strict=True):
            assert torch.equal(a, b)

    def test_any_strides_of_heads(self):
        """(length, heads, d) in memory, as a projection leaves it: the same bits, and results with these strides."""
        rows, length, d = 2, 70, 16
        together = [torch.randn(length, rows, d, device=DEVICE).transpose(0, 1) for _ in range(3)]
        buckets = torch.randint(0, 3, (rows, 2, length), device=DEVICE)
        rest = SortedOrder.by_bucket(buckets), Rule(16, "window", True, False, "alone"), None

        def run(tensors: list[Tensor]) -> list[Tensor]:
            tensors = [x.detach().requires_grad_() for x in tensors]
            out = kernels.sorted_attention(*tensors, *rest)
            return [out, *torch.autograd.grad(out.square().sum(), tensors)]

        for a, b in zip(run(together), run([x.contiguous() for x in together]), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == together[0].stride()

    def test_memory_kept_for_backward_does_not_grow_with_rounds(self):
        def kept(rounds: int) -> int:
            sizes: dict[int, int] = {}

            def pack(x: Tensor) -> Tensor:
                sizes[x.data_ptr()] = x.numel()
                return x

            q, k, v = (torch.randn(1, 64, 16, device=DEVICE).requires_grad_() for _ in range(3))
            order = SortedOrder.by_bucket(torch.randint(0, 3, (1, rounds, 64), device=DEVICE))
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                kernels.sorted_attention(q, k, v, order, Rule(8, "window", True, True, "alone"))
            return sum(sizes.values())

        # q, k, v, out and one log-sum-exp for each position.
        assert kept(4) == kept(1) == 64 * (4 * 16 + 1)

    @pytest.mark.parametrize(
        ("dtype", "width"), [(torch.float64, 16), (torch.float32, kernels.WIDEST + 1)], ids=["fp64", "wide"]
    )
    def test_refuses_other_dtypes_and_widths(self, dtype, width):
        x = torch.randn(1, 8, width, dtype=dtype, device=DEVICE)
        assert not kernels.supports(x, x)
        with pytest.raises(ConfigError, match=r"take bf16, fp16 and fp32 .* backend=chunked"):
            kernels.sorted_attention(
                x, x, x, SortedOrder.identity(1, 8, DEVICE), Rule(4, "window", True, False, "always")
            )


together = functools.partial(kernels.sorted_attention, together=True)


class TestTogether:
    """All rounds in one launch: cases that cover rules, masks, dropout, both kinds of keys, and several blocks."""

    __test__ = CAN_RUN_KERNELS

    @pytest.mark.parametrize("seed", [3, 5, 8, 12, 17])
    def test_equals_reference(self, seed):
        Case(seed, torch.float32).check(together)

    @pytest.mark.parametrize(("seed", "dtype"), [(102, torch.bfloat16), (101, torch.float16)])
    def test_equals_reference_in_half_precision(self, seed, dtype):
        Case(seed, dtype).check(together)

    @staticmethod
    def sparse(dtype: torch.dtype) -> Case:
        """Some positions find no key in any round, others in a few; some are not real."""
        case = Case(4, dtype)
        generator = torch.Generator().manual_seed(6)
        tensors = (torch.randn(2, 40, width, generator=generator) for width in (16, 16, 5, 5))
        *case.tensors, case.grad = (x.to(DEVICE, dtype) for x in tensors)
        buckets = torch.randint(0, 30, (2, 3, 40), generator=generator).to(DEVICE)
        order = SortedOrder.by_bucket(buckets, (torch.arange(80) % 7 > 1).view(2, 40).to(DEVICE))
        dropout = PairDropout(0.3, torch.arange(2, device=DEVICE))
        case.rest = order, Rule(2, "window", True, True, "alone"), dropout
        return case

    def test_padding_and_positions_that_meet_nobody(self):
        self.sparse(torch.float32).check(together)

    @pytest.mark.filterwarnings("ignore:invalid value")
    def test_nan_reaches_what_attends_to_it(self):
        case = self.sparse(torch.float32)
        case.tensors[1][:, 5::9] = float("nan")
        out = together(*case.tensors, *case.rest)
        assert 0 < out.isnan().sum() < out.numel()

    def test_the_same_bits_again_and_in_several_parts(self, monkeypatch):
        from megabase.models.attention.kernels.triton import launch

        case = self.sparse(torch.bfloat16)
        first = case.run(together)
        monkeypatch.setattr(launch, "PART", 1)
        for a, b in zip(first, case.run(together), strict=True):
            assert torch.equal(a, b)


class Launches(TorchDispatchMode):
    """Counts what is launched on the device inside: our kernels, and torch's operations that are no views."""

    VIEWS = re.compile("empty|view|expand|slice|select|detach|alias|as_strided|transpose")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self.in_kernel = False
        from megabase.models.attention.kernels.triton import forward, hashing, launch
        from megabase.models.attention.kernels.triton.together import launch as launch_together
        from megabase.models.attention.kernels.triton.together import tables

        for module in (hashing, launch, launch_together, tables):
            for name, value in vars(module).items():
                if isinstance(value, type(forward.forward_round)):
                    monkeypatch.setattr(module, name, self.Kernel(name, value, self))

    @dataclass
    class Kernel:
        """A kernel whose launches are counted; as a device function it is called as before."""

        name: str
        kernel: Any
        launches: Launches

        def __getitem__(self, grid: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> None:
                self.launches.names.append(self.name)
                self.launches.in_kernel = True
                self.kernel[grid](*args, **kwargs)
                self.launches.in_kernel = False

            return run

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.kernel(*args, **kwargs)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not self.in_kernel and not self.VIEWS.search(name):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(GPU or not CAN_RUN_KERNELS, reason="counted in the interpreter")
@pytest.mark.parametrize(
    ("together", "once", "forward", "backward"),
    [(True, False, 5, 3), (True, True, 6, 4), (False, False, 10, 5)],
)
def test_launches(together, once, forward, backward, monkeypatch):
    """Of attention with four rounds, from query-keys to gradients. Drawing the rotations is one more."""
    x, rotations = torch.randn(1, 2, 20, 16), draw_rotations(2, 16, rounds=4, n_buckets=4, seed=0)
    rule = Rule(8, "window", True, once, "never")
    qk, v = (x.flatten(0, 1).clone().requires_grad_() for _ in range(2))
    ones = torch.ones_like(v)
    with Launches(monkeypatch) as launches:
        order = kernels.sort_by_hash(x, rotations, together=together)
        out = kernels.sorted_attention(qk, None, v, order, rule, together=together)
        found = launches.names.copy()
        torch.autograd.grad(out, (qk, v), ones)
    torch.testing.assert_close(out, plain(qk, None, v, order, rule))
    assert len(found) == forward, found
    assert len(launches.names[forward:]) == backward, launches.names[forward:]


class TestHashing:
    __test__ = CAN_RUN_KERNELS

    @staticmethod
    def draw(n_buckets: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Rotations]:
        """x (2, 3, 90, d) and rotations for which rounding decides no bucket; some rows are 0."""
        rotations = draw_rotations(3, d, rounds=3, n_buckets=n_buckets, seed=n_buckets)
        generator = torch.Generator().manual_seed(d)
        while True:
            x = torch.randn(2, 3, 90, d, generator=generator).to(dtype)
            margin = 1.0
            for rotation in (r.double() for number in range(3) for r in rotations.factors(number)):
                rotated = x.double() @ rotation
                best = torch.cat([rotated, -rotated], dim=-1).topk(2).values
                margin = min(margin, (best[..., 0] - best[..., 1]).min().item())
            if margin > 1e-4:
                x[:, :, 7] = 0.0
                return x.to(DEVICE), rotations

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("n_buckets", "d"), [(2, 16), (6, 24), (64, 16), (256, 8), (512, 32)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_equals_the_plain_hash_and_sort(self, n_buckets, d, dtype, masked):
        x, rotations = self.draw(n_buckets, d, dtype)
        buckets = rotate_and_hash(x, rotations)
        assert torch.equal(kernels.rotate_and_hash(x, rotations).long(), buckets.long())
        mask = None
        if masked:
            mask = torch.rand(2, 90, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.8
            mask[1] &= n_buckets != 64
        rows = None if mask is None else mask.repeat_interleave(3, dim=0)
        expected = SortedOrder.by_bucket(buckets.flatten(0, 1), rows)
        for together in (False, True) if d == 16 else (False,):
            order = kernels.sort_by_hash(x, rotations, mask, together=together)
            assert torch.equal(order.positions.long(), expected.positions.long())
            assert torch.equal(order.slots.long(), expected.slots.long())
            assert torch.equal(order.real_lengths.long(), expected.real_lengths.long())
            occupied = torch.arange(90, device=DEVICE) < order.real_lengths[:, None, None]
            assert torch.equal(
                order.buckets.long()[occupied.expand(6, 3, 90)],
                expected.buckets.long()[occupied.expand(6, 3, 90)],
            )
            if not together:
                assert {order.positions.dtype, order.buckets.dtype, order.real_lengths.dtype} == {torch.int32}
        if d == 16:
            keys = x.flatten(0, 1) * order.key_scales[..., None]
            torch.testing.assert_close(keys, unit_keys(x.flatten(0, 1)).float(), atol=8e-3, rtol=0)

    def test_any_strides_of_heads(self):
        x, rotations = self.draw(64, 16, torch.float32)
        together = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(
            kernels.rotate_and_hash(x, rotations), kernels.rotate_and_hash(together, rotations)
        )

    def test_every_position_gets_a_slot_even_if_it_is_nan(self):
        x, rotations = self.draw(6, 24, torch.float32)
        x[0, 0, :50] = float("nan")
        positions = kernels.sort_by_hash(x, rotations).positions.long()
        assert torch.equal(
            positions.sort(dim=-1).values, torch.arange(90, device=DEVICE).expand_as(positions)
        )


# Compiled for an H100, on any machine that has Triton's NVIDIA backend.

H100_SHARED = 232448
"""Bytes of shared memory that a program may have."""

COMPILED = {
    "plain-64": ("bfloat16", 64, {}),
    "plain-128": ("bfloat16", 128, {}),
    "half-32": ("float16", 32, {}),
    "single-64": ("float32", 64, {}),
    "unit-64": ("bfloat16", 64, {"unit": True}),
    "unit-128": ("bfloat16", 128, {"unit": True}),
    "once-64": ("bfloat16", 64, {"once": True, "unit": True}),
    "dropout-64": ("bfloat16", 64, {"dropout": True}),
    "both-sides-64": ("bfloat16", 64, {"causal": False, "once": True}),
    "chunk-64": ("bfloat16", 64, {"attend": "chunk", "once": True}),
    "local-64": ("bfloat16", 64, {"own": "always", "rounds": 1}),
    "together-unit-64": ("bfloat16", 64, {"together": True, "unit": True}),
    "together-unit-128": ("bfloat16", 128, {"together": True, "unit": True}),
    "together-once-64": ("bfloat16", 64, {"together": True, "once": True, "unit": True}),
    "together-chunk-64": ("bfloat16", 64, {"together": True, "attend": "chunk", "once": True}),
}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """The resources of every kernel of every case, from one process that compiles them all."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests.models.attention.kernels.test_triton import compile_ahead; compile_ahead()",
        ],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if "no ahead-of-time compilation" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first in a new cache of Triton compiles for minutes
@pytest.mark.xdist_group("compiled")
@pytest.mark.parametrize("name", COMPILED)
def test_compiles(name, compiled):
    """For compute capability 9.0, every kernel compiles, fits, and uses tensor cores; the main case hardly spills."""
    found = [x for x in compiled if x["case"] == name]
    passes = (
        {"forward_rounds", "backward_rounds"} if "together" in name else {"forward_round", "backward_round"}
    )
    assert passes <= {x["kernel"] for x in found}
    for x in found:
        print(x)
        assert x["registers"] * 32 * x["warps"] <= 65536
        assert x["shared"] <= H100_SHARED
        if x["kernel"] in passes:
            assert x["tensor"] > 0
            if name in ("plain-64", "together-unit-64"):
                # Bytes of a thread outside the loops; spills within them take hundreds.
                assert x["stack"] <= 160


def compile_ahead() -> None:
    """Run the launches of all cases with a driver that has a target and no device; print each kernel's resources."""
    try:
        import triton
        import triton.backends.nvidia
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        tools = Path(triton.backends.nvidia.__file__).parent / "bin"
        assert (tools / "ptxas").exists() and (tools / "cuobjdump").exists()
    except (ImportError, AssertionError):
        sys.exit("no ahead-of-time compilation: this triton comes without its NVIDIA backend and tools")
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_device_capability=lambda device=0: (9, 0),
        )
    )
    launch = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        made = launch(self, *args, grid=grid, warmup=True, **settings)
        usage = {"warps": settings.get("num_warps", 4)} | _usage(made, tools)
        print(json.dumps({"case": name, "kernel": self.__name__} | usage))

    triton.JITFunction.run = compile_only
    kernels.supports = lambda q, v: True
    kernels.available = lambda: True
    for name in COMPILED:
        _launch_all(*COMPILED[name])


def _launch_all(dtype: str, d: int, options: dict[str, Any]) -> None:
    """Forward, backward and hashing of one case."""
    rounds, rows, length = options.get("rounds", 3), 2, 256
    q, k, v = (torch.randn(rows, length, d).to(getattr(torch, dtype)).requires_grad_() for _ in range(3))
    order = SortedOrder.by_bucket(torch.randint(0, 4, (rows, rounds, length)))
    rule = Rule(
        reach=128,
        attend=options.get("attend", "window"),
        causal=options.get("causal", True),
        once=options.get("once", False),
        own=options.get("own", "never" if options.get("unit") else "alone"),
    )
    dropout = PairDropout(0.1, torch.arange(rows)) if options.get("dropout") else None
    k, together = None if options.get("unit") else k, options.get("together", False)
    kernels.sorted_attention(q, k, v, order, rule, dropout, together=together).sum().backward()
    if not together:
        kernels.rotate_and_hash(
            q[None].detach(), draw_rotations(rows, d, rounds=rounds, n_buckets=512, seed=0)
        )


def _usage(made: Any, tools: Path) -> dict[str, int]:
    """Registers of a thread; bytes of stack of a thread and of shared memory; instructions for tensor cores."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", "-sass", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", report)[1]) for word in ("REG", "STACK"))
    tensor = len(re.findall(r"\b(?:HGMMA|HMMA)\b", report))
    return {"registers": registers, "stack": stack, "shared": made.metadata.shared, "tensor": tensor}
