"""`megabase bench attention|model|data`: time and memory of megabase and its peers, on this machine."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from megabase.pipeline.errors import UserError

HELP = "time and memory against the peers, on this machine"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their arguments."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    attention = benchmarks.add_parser("attention", help="one attention layer's core, forward and backward")
    model = benchmarks.add_parser("model", help="one training step; memory against length and depth")
    data = benchmarks.add_parser(
        "data", help="a loader's tokens a second, and its first batch after a resume"
    )
    _add_attention(attention)
    _add_model(model)
    _add_data(data)
    for benchmark in (attention, model):
        benchmark.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    for benchmark in (attention, model, data):
        _add_shared(benchmark)


def _add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        metavar="L,L",
        default="1k,2k,4k,8k,16k,32k,64k,128k,256k,512k,1M",
        help="tokens (default: %(default)s, each contestant as far as time and memory allow)",
    )
    parser.add_argument("--contestants", metavar="A,B", help="default: megabase and every peer")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: fp32; bf16 on a GPU")
    parser.add_argument("--heads", type=int, metavar="N", help="default: 4; 8 on a GPU")
    parser.add_argument("--head-dim", type=int, metavar="N", help="default: 64; 128 on a GPU")
    parser.add_argument("--chunk", type=int, metavar="N", help="positions; default: 64; 128 on a GPU")
    parser.add_argument("--rounds", type=int, metavar="N", default=4, help="of hashing (default: 4)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", metavar="L,L", default="2k,4k,8k,16k", help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--depths",
        metavar="D,D",
        default="2,6,12,24,48",
        help="layers, for memory at the shortest length; 0: none (default: %(default)s)",
    )
    parser.add_argument("--contestants", metavar="A,B", help="default: megabase and every peer")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and computation (default: fp32)"
    )
    for name, value in (("dim", 256), ("depth", 6), ("heads", 4), ("chunk", 64), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, metavar="N", default=value, help="default: %(default)s")
    parser.add_argument(
        "--sequence-ranks",
        type=int,
        metavar="P",
        default=1,
        help="measure one of P ranks that share each sequence, without communication (default: 1)",
    )
    parser.add_argument(
        "--longest", action="store_true", help="then double the length until a step no longer fits"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", metavar="L,L", default="8k,128k", help="bases (default: %(default)s)")
    parser.add_argument("--contestants", metavar="A,B", help="default: megabase and every peer")
    parser.add_argument(
        "--mebibytes", type=int, metavar="N", default=64, help="of records, for each length (default: 64)"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="where the records are written (default: a temporary one)",
    )


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=int, metavar="N", default=7, help="timed calls at most (default: 7)")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="longest time of a call; a contestant that takes longer is left out (default: 40 to 60; 5 on a GPU)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every measured time, and a picture beside it"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="write the picture here")


def run(options: argparse.Namespace) -> int:
    """Run one benchmark; returns the exit code."""
    if importlib.util.find_spec("psutil") is None:
        raise UserError("bench needs the package psutil: pip install 'megabase[bench]'")
    given = _given(options)
    if options.benchmark == "attention":
        from megabase.pipeline.bench import attention

        return attention.run(attention.AttentionOptions(**given))
    if options.benchmark == "model":
        from megabase.pipeline.bench import model

        return model.run(model.ModelOptions(**given))
    from megabase.pipeline.bench import data

    return data.run(data.DataOptions(**given))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options of one benchmark, by name, without those that choose it."""
    return {name: value for name, value in vars(options).items() if name not in ("command", "benchmark")}
