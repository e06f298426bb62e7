"""`megabase train --dry-run`: check a run as a start does, and print its plan. Nothing is started or written."""

from __future__ import annotations

from megabase.pipeline.checkpoint.next_start import NextStart, evaluates, next_start, unused_changes
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.hardware import Machine, precision_of
from megabase.pipeline.plan.limits import changed
from megabase.pipeline.plan.profiles import CPU
from megabase.pipeline.plan.request import choose
from megabase.pipeline.plan.run import plan
from megabase.pipeline.plan.table import Row, as_table
from megabase.pipeline.plan.warnings import warnings_of
from megabase.pipeline.ranks.environment import local_devices
from megabase.pipeline.tables import show
from megabase.pipeline.training.check import check
from megabase.pipeline.training.machine import check_machine, warnings_about


def dry_run(config: RunConfig, arguments: list[str]) -> None:
    """Print the plan of a run, and what a start would warn of, also if this machine cannot train it.

    Args:
        config: of the run.
        arguments: the command line after `megabase train`.

    Raises:
        UserError, DataError, ConfigError: what a start would raise. That the run's checkpoints are gone, or that this
            machine cannot train it, is raised after the plan.
    """
    devices = config.trainer.devices or local_devices(None)
    ranks = config.trainer.nodes * devices
    windows = check(config, ranks)
    start = next_start(config, ranks, windows.index)
    chosen = choose(changed(config, "trainer.devices", devices))
    precision = precision_of(config.trainer.precision, on_gpus=chosen.profile.device != CPU)
    planned = plan(changed(config, "trainer.devices", devices), windows.plan, precision, chosen.profile)
    notes = [*start.damaged]
    if start.finished and start.changes:
        notes.append(unused_changes(start.changes) + ".")
    elif start.step and start.changes:
        notes.append(f"It resumes with {', '.join(start.changes)}.")
    if not evaluates(config, windows.index):
        notes.append(
            "There is no validation window: the run is not evaluated. `megabase prepare --valid` makes a split."
        )
    notes += [f"{warning}." for warning in warnings_of(planned)]
    refused = None
    if config.trainer.nodes == 1:
        machine = Machine.this()
        try:
            check_machine(config, devices, machine, arguments)
            notes += warnings_about(config, machine)
        except UserError as error:
            refused = error
    notes.append(f"Hardware: {chosen.profile.name} ({chosen.why}).")
    show(as_table(planned, _start(config, start)), *notes)
    if start.refused:
        raise UserError(f"it does not start: {start.refused}")
    if refused:
        raise UserError(f"on this machine it does not start: {refused}")


def _start(config: RunConfig, start: NextStart) -> Row:
    if start.finished:
        return ("start", f"step {start.step:,}", "finished: nothing is left to do")
    if start.refused:
        return ("start", "refused", start.refused)
    if not start.step:
        weights = f", from the weights of {config.run.init_from}" if config.run.init_from else ""
        return ("start", "step 0", f"a new run in {config.directory}{weights}")
    unchecked = "" if start.verified else "; its checksums were not compared"
    return ("start", f"step {start.step:,}", f"resumes from its checkpoint{unchecked}")
