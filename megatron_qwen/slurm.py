"""Queries to Slurm, through its own programs. All of them work without slurmdbd.

The state of jobs comes from ``squeue`` and ``scontrol show``, because ``sacct`` fails without an accounting database.
"""

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.errors import Problem, UserError

# Slurm's own MessageTimeout is 10 s by default, and its programs try again: one that says nothing for a minute hangs.
# Chosen by hand.
_TIMEOUT_S = 60.0
_CONFIGURATIONS = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")
_PAIR = re.compile(r"(\S+?)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)")
_QUEUE_FIELDS = ("%i", "%T", "%r", "%M", "%L", "%N", "%S", "%j", "%Q", "%x", "%k")
_LOST = ("DOWN", "FAIL", "NOT_RESPONDING", "POWERED_DOWN")
# Words of a node's state (scontrol show node): a base state and flags, joined by +. A node that power saving has
# switched off (POWERED_DOWN, POWERING_DOWN) is not among them: Slurm starts it when a job needs it.
_UNUSABLE = frozenset(
    (
        *("DOWN", "ERROR", "FAIL", "FAILING", "FUTURE", "INVAL", "INVALID_REG", "MAINT", "NOT_RESPONDING", "UNKNOWN"),
        *("DRAIN", "DRAINED", "DRAINING", "REBOOT", "REBOOT_ISSUED", "REBOOT_REQUESTED", "BLOCKED"),
    )
)
_IDS_AT_ONCE = 1000  # a command line may have 128 KiB an argument
_MARKS = "$@^~#!%-"  # sinfo appends one of these to a state that a flag describes


# Final states of a job.
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)


class SlurmError(UserError):
    """Slurm refused or did not answer (exit 1)."""

    kind = "Slurm"


def is_there() -> bool:
    """Whether this machine belongs to a Slurm cluster: Slurm's programs are installed and configured.

    A slurmctld that does not answer at the moment does not matter; programs without a configuration do not count.
    """
    if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
        return False
    named = [os.environ.get("SLURM_CONF", ""), *_CONFIGURATIONS]
    if "SLURM_CONF_SERVER" in os.environ or any(name and Path(name).is_file() for name in named):
        return True
    try:  # a configless cluster, found through DNS
        return "is UP" in ask("scontrol", "ping", timeout_s=10)
    except SlurmError:
        return False


def ask(*command: str, timeout_s: float = _TIMEOUT_S) -> str:
    """The output of a Slurm program.

    Raises:
        SlurmError: the program is not installed, failed, or did not answer in time.
    """
    try:
        # People write Reason= and Comment= in any encoding, and no answer is lost for one of their letters.
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            env=_plain_environment(),
            check=False,
        )
    except FileNotFoundError:
        fix = "is not on PATH; load the site's Slurm module, or run this on a login node."
        raise SlurmError(Problem(command[0], None, fix)) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            Problem(
                " ".join(command),
                None,
                f"did not answer within {timeout_s:.0f} s; check `scontrol ping` and try again.",
            )
        ) from None
    if done.returncode:
        raise SlurmError(Problem(" ".join(command), None, (done.stderr or done.stdout).strip().replace("\n", "; ")))
    return done.stdout


def _plain_environment() -> dict[str, str]:
    """The environment without variables that filter or reformat the output of Slurm's programs."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SQUEUE_", "SINFO_", "SACCT_")) and name not in ("SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
    }


def fields(line: str) -> dict[str, str]:
    """``Key=Value`` pairs of a line of ``scontrol show -o``; values may contain blanks."""
    return {key: value.strip() for key, value in _PAIR.findall(line.strip())}


def show_job(job_id: str) -> dict[str, str]:
    """The fields of a job in ``scontrol show job``."""
    lines = ask("scontrol", "show", "job", "-o", job_id).splitlines()
    return fields(lines[0]) if lines else {}


def show_nodes(names: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Fields of nodes by node name; of all nodes if none is named.

    Cloud nodes that are powered down are missing unless slurm.conf has PrivateData=cloud.
    """
    # -a: without it nodes that are only in hidden partitions are left out.
    lines = ask("scontrol", "-a", "show", "node", "-o", *([",".join(names)] if names else [])).splitlines()
    shown = [fields(line) for line in lines if line.strip()]
    return {node["NodeName"]: node for node in shown if "NodeName" in node}


def show_partitions() -> dict[str, dict[str, str]]:
    """Fields of partitions by partition name, hidden ones included."""
    shown = [fields(line) for line in ask("scontrol", "-a", "show", "partition", "-o").splitlines() if line.strip()]
    return {partition["PartitionName"]: partition for partition in shown if "PartitionName" in partition}


def unseen_nodes(partition: dict[str, str], shown: int) -> int:
    """Nodes of a partition that Slurm counts and does not show.

    Args:
        partition: its fields.
        shown: nodes of it that ``show_nodes`` has.
    """
    total = partition.get("TotalNodes", "")
    return max(0, int(total) - shown) if total.isdecimal() else 0


def show_config() -> dict[str, str]:
    """The settings of the cluster by their names in slurm.conf."""
    pairs = (line.partition("=") for line in ask("scontrol", "show", "config").splitlines())
    return {name.strip(): value.strip() for name, sign, value in pairs if sign}


def largest_array() -> int | None:
    """Tasks that an array may have; None where Slurm does not say.

    MaxArraySize is one more than the largest index; 0 turns arrays off.
    """
    value = show_config().get("MaxArraySize", "")
    return int(value) if value.isdecimal() else None


def enforces_limits_of_all_partitions() -> bool:
    """Whether sbatch refuses a job that exceeds a limit of any partition of its list (EnforcePartLimits=ALL)."""
    return show_config().get("EnforcePartLimits", "").upper() == "ALL"


def is_usable(node: dict[str, str]) -> bool:
    """Whether a node can run jobs, now or after Slurm has started it."""
    state = node.get("State", "")
    return "*" not in state and not any(word.rstrip(_MARKS) in _UNUSABLE for word in state.split("+"))


def gpus_of(node: dict[str, str]) -> dict[str, int]:
    """GPUs of a node by type, from ``gpu:h100:8(S:0-1),nic:2``; the type is empty in ``gpu:8``."""
    found: dict[str, int] = {}
    for part in node.get("Gres", "").split(","):
        words = part.partition("(")[0].split(":")
        if words[0] == "gpu" and words[-1].isdecimal():
            kind = words[1] if len(words) == 3 else ""
            found[kind] = found.get(kind, 0) + int(words[-1])
    return found


def is_lost(node: dict[str, str]) -> bool:
    """Whether the processes on a node must be considered lost."""
    state = node.get("State", "")
    return "*" in state or any(word in state for word in _LOST)


def hostnames(node_list: str) -> list[str]:
    """``n[1-3,07],m`` as names. Parsed here, because not every site has Slurm's programs on its nodes."""
    names: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", node_list):
        pieces = re.split(r"\[([^\]]*)\]", part)
        found = [pieces[0]]
        for ranges, text in zip(pieces[1::2], pieces[2::2], strict=True):
            found = [f"{name}{number}{text}" for name in found for number in _numbers(ranges)]
        names += found
    return names


def _numbers(ranges: str) -> list[str]:
    """``1-3,07`` as 1, 2, 3, 07; leading zeros stay."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        width = len(first)
        numbers += [str(number).zfill(width) for number in range(int(first), int(last or first) + 1)]
    return numbers


def tasks_per_node(text: str) -> list[int]:
    """``4(x2),3`` as [4, 4, 3]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def minutes(text: str) -> float | None:
    """``2-12:00:00``, ``1:30:00``, ``45:00`` or ``90`` as minutes; None for no limit or no time at all."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        return days * 1440 + (first or 0) * 60 + (second or 0) + (third or 0) / 60
    if third is not None:
        return (first or 0) * 60 + (second or 0) + third / 60
    return (first or 0) + (second or 0) / 60


@dataclass(frozen=True)
class QueuedJob:
    """A job in the output of squeue.

    Args:
        job_id: ``12`` or ``12_3``.
        state: such as PENDING, RUNNING.
        reason: why it waits.
        elapsed: time it has run.
        left: time it has left.
        nodes: its node list.
        start: when it starts or started.
        name: job name.
        priority: 0 for a held one.
        excluded: node list that it is kept from.
        comment: what ``scontrol update`` has noted with it.
    """

    job_id: str
    state: str
    reason: str
    elapsed: str
    left: str
    nodes: str
    start: str
    name: str
    priority: str
    excluded: str = ""
    comment: str = ""

    @property
    def is_held(self) -> bool:
        """Whether it is held: it does not start until a person releases it."""
        reason = self.reason.lower()
        return self.state == "PENDING" and ("held" in reason or self.priority == "0")


def queue() -> dict[str, QueuedJob]:
    """This user's jobs by id; every task of an array is a job."""
    return _queued("--me")


def named(name: str, *, user: int) -> dict[str, QueuedJob]:
    """A user's jobs of a name by id, those too that have ended lately."""
    return _queued(f"--name={name}", f"--user={user}")


def jobs(job_ids: Sequence[str]) -> dict[str, QueuedJob]:
    """Those of the jobs that Slurm knows, whoever's they are; it forgets a job some minutes after its end (MinJobAge).

    A cluster may hide other users' jobs (PrivateData=jobs); those are not among them either.
    """
    found: dict[str, QueuedJob] = {}
    for some in itertools.batched(dict.fromkeys(job_ids), _IDS_AT_ONCE):
        try:
            found |= _queued("-j", ",".join(some))
        except SlurmError as error:
            if "Invalid job id" not in str(error):  # what Slurm says of a single one that it has forgotten
                raise
    return found


def steps(job_id: str, names: Sequence[str]) -> list[str]:
    """Steps of a job that have one of these names and have not ended, as JOB.STEP."""
    pairs = (line.split(maxsplit=1) for line in ask("squeue", "-h", "-s", "-j", job_id, "-o", "%i %j").splitlines())
    return [pair[0] for pair in pairs if len(pair) == 2 and pair[1].strip() in names]


def hides_jobs() -> bool:
    """Whether this cluster shows users their own jobs only; False where it does not say."""
    try:
        lines = ask("scontrol", "show", "config").splitlines()
    except SlurmError:
        return False
    values = dict(line.partition("=")[::2] for line in lines)
    return "jobs" in next((value for name, value in values.items() if name.strip() == "PrivateData"), "")


def _queued(*which: str) -> dict[str, QueuedJob]:
    lines = ask("squeue", *which, "-h", "-r", "-t", "all", "-o", "|".join(_QUEUE_FIELDS)).splitlines()
    # The comment comes last: it is a person's text, and may have the sign as well.
    last = len(_QUEUE_FIELDS) - 1
    jobs = [QueuedJob(*line.split("|", last)) for line in lines if line.count("|") >= last]
    return {job.job_id: job for job in jobs}


def accounting(job_ids: Sequence[str]) -> dict[str, str]:
    """States of jobs in the accounting database, by job id; empty without one."""
    if not job_ids or shutil.which("sacct") is None:
        return {}
    try:
        lines = ask("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(job_ids)).splitlines()
    except SlurmError:
        return {}
    pairs = [line.split("|") for line in lines]
    return {pair[0]: pair[1].split()[0] for pair in pairs if len(pair) == 2 and pair[1].strip()}
