"""The page of a run: one HTML file with everything in it, pictures too, which opens anywhere and loads nothing."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable
from pathlib import Path

from megabase.datamodules.files import publish
from megabase.models.config import ReformerConfig
from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.plan.parameters import count_parameters
from megabase.pipeline.readable import counted, readable_size, readable_time
from megabase.pipeline.report.pictures import Picture, pictures
from megabase.pipeline.report.record import Record, read_run
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import read_status

_STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; color: #222; max-width: 62em; margin: 2.5em auto; padding: 0 1.5em; }
h1 { font-size: 1.7em; margin-bottom: .2em; } h2 { font-size: 1.2em; margin-top: 2.2em; }
p.state { color: #555; margin-top: 0; } img { width: 100%; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .25em 1.2em .25em 0; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #e6e6e6; } td.number { font-variant-numeric: tabular-nums; }
code, pre { font: 13px/1.5 ui-monospace, monospace; } pre { background: #f6f6f6; padding: 1em; overflow-x: auto; }
summary { cursor: pointer; color: #2f6690; }
"""


def write_report(directory: Path) -> Path:
    """Write `report.html` and the pictures `pictures/NAME.png` of a run; returns the path of the page.

    Raises:
        UserError: there is no run, or a file of it cannot be read.
        OSError: the page cannot be written.
    """
    record = read_run(directory)
    paths = RunPaths(directory)
    drawn = list(pictures(record))
    paths.pictures.mkdir(exist_ok=True)
    for picture in drawn:
        publish(paths.pictures / f"{picture.name}.png", picture.png)
    publish(paths.report, page(record, drawn).encode())
    return paths.report


def page(record: Record, drawn: Iterable[Picture]) -> str:
    """The HTML of a run's page.

    Args:
        record: of the run.
        drawn: its pictures.
    """
    name = html.escape(record.config.run.name)
    sections = "".join(_section(picture) for picture in drawn)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>
<h1>{name}</h1>
<p class="state">{html.escape(_state(record))}</p>
<p>{html.escape(" ".join(summary(record)))}</p>
{_table(key_figures(record))}
{sections}
<h2>Settings</h2>
<p>Settings that differ from their defaults. <code>config.yaml</code> in the run directory has all of them.</p>
{_table([(key, json.dumps(value)) for key, value in changed_settings(record.config).items()], code=True)}
<h2>Environment of the last start</h2>
<details><summary>versions, hardware, command</summary>
<pre>{html.escape(json.dumps(record.environment, indent=1))}</pre></details>
</body></html>
"""


def summary(record: Record) -> list[str]:
    """What was trained and how well it went, in sentences."""
    config, model = record.config, record.config.model
    last = record.steps[-1]["step"] if record.steps else 0
    size = _parameters(record)
    what = f"a Reformer of dim {model.dim} and depth {model.depth}" + (
        f" ({size:,} parameters)" if size else ""
    )
    sentences = [
        f"This run trains {what} on {config.data.shards}, in windows of {config.data.length:,} bases.",
        f"It has read {last * record.tokens_per_step:,} tokens in {counted(last, 'optimizer step')}"
        f" of at most {config.trainer.max_steps:,}, in {readable_time(3600 * record.hours)} of training"
        f" and {counted(len(record.starts), 'start')}.",
    ]
    if best := record.best:
        text = f"The best validation is {best['valid_bits_per_base']:.4f} bits per base, at step {best['step']:,}"
        orders = {
            key: value
            for key, value in best.items()
            if key.startswith("markov_") and isinstance(value, float)
        }
        if orders:
            name = min(orders, key=lambda key: orders[key])
            text += (
                f"; a Markov model of order {name.split('_')[1]} has {orders[name]:.4f} on the same windows"
            )
        sentences.append(f"{text}.")
    return sentences


def key_figures(record: Record) -> list[tuple[str, str]]:
    """The figures of the table at the top."""
    found: list[tuple[str, str]] = []
    if record.evaluations:
        last = record.evaluations[-1]
        found.append(
            (
                "last validation",
                f"{float(last['valid_bits_per_base']):.4f} bits per base at step {last['step']:,}",
            )
        )
        if "full_valid_bits_per_base" in last:
            found.append(
                ("whole validation split", f"{float(last['full_valid_bits_per_base']):.4f} bits per base")
            )
        if "valid_recall_bits" in last:
            found.append(("gained by a copy", f"{float(last['valid_recall_bits']):.4f} bits per base"))
    if record.speeds:
        speed = record.speeds[-1]
        text = f"{speed['tokens_per_second']:,.0f} tokens per second on all ranks"
        found.append(("speed", text + (f", MFU {speed['mfu']:.1%}" if "mfu" in speed else "")))
    if record.measured:
        found.append(("most memory of a rank", readable_size(record.measured[-1]["rank_memory_bytes_most"])))
    if record.checkpoints:
        last = record.checkpoints[-1]
        text = f"step {last['step']:,}, {readable_size(last['checkpoint_bytes'])}"
        found.append(("last checkpoint", f"{text}, in {readable_time(last['checkpoint_seconds'])}"))
    found.append(("ranks", _ranks(record)))
    found.append(("run directory", str(record.directory.absolute())))
    return found


def changed_settings(config: RunConfig) -> dict[str, object]:
    """The settings that differ from their defaults, by their dotted keys."""
    defaults = dotted(RunConfig())
    return {key: value for key, value in dotted(config).items() if defaults.get(key) != value}


def _state(record: Record) -> str:
    state, step = read_status(record.directory)
    return f"{state or 'not started'}{'' if step is None else f', step {step:,}'}"


def _parameters(record: Record) -> int | None:
    """The parameters of the model; None if the size of the vocabulary is not known, because no start has set it."""
    model: ReformerConfig = record.config.model
    return sum(count_parameters(model).values()) if model.vocab_size else None


def _ranks(record: Record) -> str:
    gpus = record.environment.get("gpus") or []
    devices = gpus[0] if gpus else record.environment.get("processor", "CPUs")
    trainer = record.config.trainer
    ranks = "" if trainer.devices is None else f" with {counted(trainer.devices, 'rank')}"
    each = " each" if ranks and trainer.nodes > 1 else ""
    return f"{counted(trainer.nodes, 'node')}{ranks}{each}, ZeRO stage {record.config.zero.stage}, {devices}"


def _section(picture: Picture) -> str:
    image = base64.b64encode(picture.png).decode()
    return (
        f"<h2>{html.escape(picture.title)}</h2>\n<p>{html.escape(picture.text)}</p>\n"
        f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{image}">\n'
    )


def _table(rows: Iterable[tuple[str, str]], *, code: bool = False) -> str:
    tag, end = ("<code>", "</code>") if code else ("", "")
    cells = "".join(
        f'<tr><th>{tag}{html.escape(name)}{end}</th><td class="number">{tag}{html.escape(value)}{end}</td></tr>\n'
        for name, value in rows
    )
    return f"<table>\n{cells}</table>"
