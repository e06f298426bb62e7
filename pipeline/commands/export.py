"""`megabase export RUN OUT`: the weights of a run's checkpoint as one model that needs neither ranks nor DeepSpeed."""

from __future__ import annotations

import argparse
from pathlib import Path

from megabase.pipeline.commands.choice import add_choice, chosen

HELP = "a run's weights as one file"
DESCRIPTION = (
    "Write the weights of a run's newest checkpoint that verifies as one model, without ranks or DeepSpeed."
    " The run may be training. Load it with megabase.models.pretrained.from_pretrained(OUT)."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("directory", metavar="RUN", help="run directory: <run.root>/<run.name>")
    parser.add_argument(
        "output", metavar="OUT", type=Path, help="directory to make; it appears only when it is complete"
    )
    parser.add_argument(
        "--format",
        choices=["safetensors", "huggingface"],
        default="safetensors",
        help="safetensors (the default): in pieces, in little memory; huggingface: for transformers, if"
        " the model can be converted; needs three times the memory of the model",
    )
    add_choice(parser)
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the exported weights (default: fp32)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.pipeline.inference.export import export

    checkpoint = export(
        Path(options.directory),
        options.output,
        form=options.format,
        step=chosen(options.step),
        dtype=options.dtype,
    )
    print(f"{options.output}: the weights of {checkpoint}")
    return 0
