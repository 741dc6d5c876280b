"""A real Slurm on this machine: munged, slurmctld and four slurmd with fake GPUs, on free ports, in one directory.

Every node is this machine. Jobs run as the user who starts the cluster.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.processes.job_server import JobPython
from tests.processes.protocol import PYTHON_VARIABLE
from tests.slurm.accounting import Accounting

PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "sbatch", "srun")
NODES = ("n1", "n2", "n3", "n4")
_START_TIMEOUT_S = 60.0
_CREDENTIAL_S = 5

_SLURM_CONF = """
ClusterName=mq
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=15
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=20
InactiveLimit=0
MinJobAge=600
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=500000,batch_sched_delay=0
{accounting}
{nodes}
PartitionName=train Nodes=n[1-4] Default=YES MaxTime=24:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n[1-4] MaxTime=1:00:00 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=closed Nodes=n4 MaxTime=1:00:00 State=DOWN
"""


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that are not on this machine."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class SlurmCluster:
    """The daemons, and what tests do to them.

    Args:
        root: directory for keys, state, spool and logs.
        accounting: whether a slurmdbd with a database of its own keeps the records.
    """

    def __init__(self, root: Path, *, accounting: bool = False) -> None:
        self.root = root
        self.conf = root / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._requeued: dict[str, float] = {}
        ports = free_ports(3 + len(NODES))
        self._controller_port, self._node_ports = ports[0], dict(zip(NODES, ports[3:], strict=True))
        self._accounting = Accounting(root, port=ports[1], database_port=ports[2]) if accounting else None
        self.job_python: JobPython | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a shell needs to talk to this cluster."""
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        python = {PYTHON_VARIABLE: str(self.job_python.path)} if self.job_python else {}
        return {"SLURM_CONF": str(self.conf), "PATH": path, **python}

    def start(self) -> None:
        """Starts all daemons and waits until the nodes are idle."""
        for name in ("state", "spool", *(f"spool/{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.job_python = JobPython(self.root / "job_python", {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        self._write_configuration()
        self._start_munge()
        if self._accounting is not None:
            self._accounting.start()
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def stop(self) -> None:
        """Ends every daemon that this object started."""
        for node in NODES:
            self._end(node, signal.SIGTERM)
        self._end("slurmctld", signal.SIGTERM)
        if self._accounting is not None:
            self._accounting.stop()
        self._end("munged", signal.SIGTERM)
        if self.job_python is not None:
            self.job_python.close()

    def start_controller(self) -> None:
        """Starts slurmctld and waits until it answers."""
        self._start("slurmctld", ["slurmctld", "-D"])
        self._wait(lambda: self.ask("scontrol", "ping", check=False).find("is UP") > 0, "slurmctld does not answer")

    def end_controller(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends slurmctld."""
        self._end("slurmctld", number)

    def start_node(self, node: str) -> None:
        """Starts a slurmd."""
        self._start(node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """Kills a slurmd; what it started lives on, as on a node that lost its network."""
        self._end(node, signal.SIGKILL)

    def wait_until_idle(self) -> None:
        """Waits until no node is down, drained or busy."""

        def idle() -> bool:
            states = self.ask("sinfo", "-h", "-N", "-p", "train", "-o", "%T").split()
            return len(states) == len(NODES) and set(states) == {"idle"}

        self._wait(idle, "the nodes do not become idle")

    def hasten(self) -> None:
        """Starts requeued jobs as soon as their old credential has expired; Slurm itself waits twice as long.

        Sooner, a start would fail with "Job credential revoked".
        """
        waiting = set()
        for line in self.ask("squeue", "-h", "-t", "PD", "-o", "%i %r", check=False).splitlines():
            job, _, reason = line.partition(" ")
            if reason == "BeginTime":
                waiting.add(job)
                seen = self._requeued.setdefault(job, time.monotonic())
                if time.monotonic() - seen > _CREDENTIAL_S + 1:
                    self.ask("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        self._requeued = {job: seen for job, seen in self._requeued.items() if job in waiting}

    def clear(self) -> None:
        """Cancels every job and brings every daemon and node back."""
        if "slurmctld" not in self._daemons:
            self.start_controller()
        for node in NODES:
            if node not in self._daemons:
                self.start_node(node)
        jobs = self.ask("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            self.ask("scancel", *sorted(set(jobs)), check=False)
        self.ask("scontrol", "update", f"NodeName={','.join(NODES)}", "State=RESUME", check=False)
        self.wait_until_idle()

    def ask(self, *command: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        """Output of a Slurm program."""
        env = {**os.environ, **self.environment, **(environment or {})}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def _write_configuration(self) -> None:
        lines = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 Boards=1 SocketsPerBoard=1 "
            f"CoresPerSocket=8 ThreadsPerCore=1 RealMemory=16000 Gres=gpu:4 State=UNKNOWN"
            for node, port in self._node_ports.items()
        ]
        accounting = "AccountingStorageType=accounting_storage/none\nJobAcctGatherType=jobacct_gather/none"
        if self._accounting is not None:
            accounting = (
                "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=localhost\n"
                f"AccountingStoragePort={self._accounting.port}\nAccountingStoragePass={self.root}/munge.socket\n"
                "JobAcctGatherType=jobacct_gather/linux"
            )
        self.conf.write_text(
            _SLURM_CONF.format(
                user=getpass.getuser(),
                root=self.root,
                controller_port=self._controller_port,
                nodes="\n".join(lines),
                accounting=accounting,
            )
        )
        # Slurm asks of a device that its file is there, and no more.
        for number in range(4):
            (self.root / f"gpu{number}").touch()
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-3]\n")

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.root}/munge.{name}" for option, name in files.items()]
        self._start("munged", ["munged", "--foreground", "--force", f"--key-file={key}", *options])
        self._wait((self.root / "munge.socket").exists, "munged does not start")

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.root / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _end(self, name: str, number: signal.Signals) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.send_signal(number)
        try:
            daemon.wait(30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _wait(self, ready: object, complaint: str) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not ready():  # type: ignore[operator]
            if time.monotonic() > deadline:
                log = self.root / "slurmctld.log"
                tail = log.read_text(errors="replace")[-3000:] if log.is_file() else ""
                raise TimeoutError(f"{complaint}:\n{tail}")
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextmanager
def running(root: Path, *, accounting: bool = False) -> Iterator[SlurmCluster]:
    """A cluster that is up inside the block."""
    cluster = SlurmCluster(root, accounting=accounting)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
