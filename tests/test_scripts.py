"""Every shell script of the tree passes shellcheck."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

SCRIPTS = [
    ROOT / "mq",
    ROOT / ".ci/run",
    *sorted((ROOT / "slurm").glob("*.sh")),
    ROOT / "slurm/train.sbatch",
    ROOT / "slurm/container/add_packages.sh",
    ROOT / "tools/wheelhouse.sh",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    if shutil.which("shellcheck") is None:
        reason = "shellcheck is not installed: apt-get install shellcheck"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
