"""The slurm.conf of a test cluster."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

CPUS = 8
# slurmctld lets a requeued job wait for as long as a credential lives, and takes no less than 5 s. Do not cut
# the wait short with `scontrol update StartTime=now`: a node that still knows the old credential refuses the
# job, and slurmctld then fails it ("Job credential revoked").
REQUEUE_DELAY_S = 5
# Seconds without an answer after which slurmctld sets a node down.
NODE_TIMEOUT_S = 15

_CONFIG = """\
ClusterName=testcluster
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
# A job id of its own range, so that a job is not taken for one of another cluster.
FirstJobId={port}

AuthType=auth/{auth}
AuthInfo={auth_info}cred_expire={requeue_delay}
CredType=cred/{auth}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true

SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
# Look for work at once, not every few seconds.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SlurmdTimeout={node_timeout}
MinJobAge=86400

StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log

{nodes}
# A job in `urgent` preempts the others: SIGTERM to their tasks, at most 30 s, back into the queue or the end.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=spot Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30 PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def configuration(directory: Path, nodes: Sequence[str], munge: bool) -> str:
    """The text of slurm.conf for these nodes, with ports that are free now."""
    host = socket.gethostname().split(".")[0]
    port, *node_ports = _free_ports(1 + len(nodes))
    lines = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={CPUS} Weight={weight}"
        for weight, (name, node_port) in enumerate(zip(nodes, node_ports, strict=True), 1)
    )
    return _CONFIG.format(
        host=host,
        port=port,
        user=os.geteuid(),
        directory=directory,
        nodes=lines,
        requeue_delay=REQUEUE_DELAY_S,
        node_timeout=NODE_TIMEOUT_S,
        auth="munge" if munge else "none",
        auth_info=f"socket={directory}/munge/socket," if munge else "",
    )


def _free_ports(number: int) -> list[int]:
    """Different TCP ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
