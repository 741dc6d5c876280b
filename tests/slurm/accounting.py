"""slurmdbd and a MariaDB of its own for a cluster of the tests."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")

_SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
LogFile={root}/slurmdbd.log
PidFile={root}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""
_TIMEOUT_S = 60.0


def missing_programs() -> list[str]:
    """Programs that are not on this machine."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Accounting:
    """Both daemons.

    Args:
        root: directory of the cluster; its munged must run before ``start``.
        port: of slurmdbd.
        database_port: of MariaDB, on this machine alone.
    """

    def __init__(self, root: Path, *, port: int, database_port: int) -> None:
        self.root, self.port, self._database_port = root, port, database_port
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Makes a database and starts both."""
        data, path = self.root / "mariadb", self.root / "mariadb.socket"
        user = getpass.getuser()
        self._run("mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}", "--skip-test-db")
        self._start(
            "mariadbd",
            "--no-defaults",
            f"--datadir={data}",
            f"--socket={path}",
            f"--port={self._database_port}",
            "--bind-address=127.0.0.1",
            f"--pid-file={self.root}/mariadb.pid",
            f"--user={user}",
        )
        self._wait(path.exists, "mariadbd")
        statements = (
            "CREATE DATABASE slurm_acct_db; CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm'; "
            "CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'slurm'; "
            "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1'; GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';"
        )
        self._run("mariadb", "--no-defaults", f"--socket={path}", f"--user={user}", "-e", statements)
        conf = self.root / "slurmdbd.conf"
        conf.write_text(
            _SLURMDBD_CONF.format(root=self.root, port=self.port, database_port=self._database_port, user=user)
        )
        conf.chmod(0o600)
        self._start("slurmdbd", "-D")
        self._wait(self._answers, "slurmdbd")

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        """Ends both, slurmdbd first."""
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.root / "slurm.conf")}

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment(), timeout=120)
        assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"

    def _start(self, *command: str) -> None:
        with (self.root / f"{command[0]}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _wait(self, ready: object, name: str) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not ready():  # type: ignore[operator]
            if time.monotonic() > deadline:
                raise TimeoutError((self.root / f"{name}.out").read_text(errors="replace")[-3000:])
            time.sleep(0.2)
