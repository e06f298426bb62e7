"""What to say of a plan: that it does not fit, what starves, what takes longer than a time limit."""

from __future__ import annotations

from megabase.pipeline.config.slurm import seconds_of_limit
from megabase.pipeline.plan.run import Plan
from megabase.pipeline.readable import readable_size, readable_time

_SHARE = 0.3


def warnings_of(plan: Plan) -> list[str]:
    """Warnings, the gravest first; empty if there is nothing to say."""
    found = [does_not_fit(plan), plan.batches.warning, _starving(plan), _talking(plan), _across(plan)]
    found += _limits(plan)
    return [each for each in found if each]


def does_not_fit(plan: Plan) -> str | None:
    """Why a run does not fit, and the nearest settings that do; None if it fits."""
    space = plan.space
    if space.fits:
        return None
    if space.needed > space.available:
        where, needed, available = "a rank", space.needed, space.available
    else:
        where, needed, available = "the host memory of a node", space.host_needed, space.host_available
    problem = (
        f"does not fit: {where} needs {readable_size(needed)} of the {readable_size(available)} that"
        f" {plan.profile.name} has for it"
    )
    nearest = plan.fitting.nearest(plan.config)
    if nearest is None:
        return f"{problem}; no change of micro batch, ZeRO, sharing of windows or length makes it fit"
    return f"{problem}: it would with {' '.join(nearest)}"


def _starving(plan: Plan) -> str | None:
    step = plan.speed.step
    share = step.launches / step.total
    if plan.profile.device == "cpu" or share < _SHARE:
        return None
    return (
        f"a rank starves: it waits for the host to launch kernels for {share:.0%} of a step: raise data.micro_batch or"
        " data.length"
    )


def _talking(plan: Plan) -> str | None:
    step = plan.speed.step
    share = (step.reduction + step.exchange) / step.total
    if share < _SHARE:
        return None
    way_out = "raise data.global_batch" if step.reduction > step.exchange else "lower trainer.sequence_ranks"
    return f"communication takes {share:.0%} of a step: {way_out}, or take fewer ranks"


def _across(plan: Plan) -> str | None:
    trainer = plan.config.trainer
    if trainer.sequence_ranks <= (trainer.devices or 1):
        return None
    return (
        f"trainer.sequence_ranks={trainer.sequence_ranks} is more than the {trainer.devices} ranks of a node:"
        " windows are exchanged over the network"
    )


def _limits(plan: Plan) -> list[str]:
    """What does not go together with the time limits of SLURM."""
    slurm, step = plan.config.slurm, plan.speed.step.total
    found = []
    if plan.profile.device != "cpu" and 2 * step > slurm.signal_seconds:
        found.append(
            f"slurm.signal_seconds={slurm.signal_seconds} is less than twice a step of {readable_time(step)}: raise it,"
            " so that a step and a checkpoint are done before the time limit"
        )
    limit = seconds_of_limit(slurm.time)
    if limit is not None and limit - slurm.signal_seconds < 2 * step:
        found.append(
            f"slurm.time={slurm.time}: a start of the job has time for less than two steps of {readable_time(step)}"
        )
    return found
