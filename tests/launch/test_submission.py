"""The script of a job."""

import os
import subprocess
from dataclasses import replace

import pytest

from launch import request as requests
from launch.submission import script


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"SLURM_JOB_ID": "7"}, "7_0_log.out"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2_0_log.out"),
    ],
)
def test_a_script_opens_its_output_itself(tmp_path, variables, name):
    """Slurm fails a job whose output it cannot open."""
    request = replace(requests.make("tiny_dense", [], nodes=1, cluster="cpu", name="run", dry=True), run_dir=tmp_path)
    lines = script(request).splitlines()
    assert "#SBATCH --output=/dev/null" in lines
    own = next(line for line in lines if "_log.out" in line)
    env = {**os.environ, **variables}

    def printed() -> str:
        done = subprocess.run(["bash", "-c", f"{own}\necho hello"], env=env, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout

    assert printed() == "hello\n", "it goes on where the directory is not there"
    (tmp_path / "submission").mkdir()
    assert (printed(), printed()) == ("", "")
    assert (tmp_path / "submission" / name).read_text() == "hello\nhello\n"


def test_a_sites_own_output_stays():
    request = requests.make("tiny_dense", [], nodes=1, cluster="cpu", name="run", dry=True)
    cluster = replace(request.cluster, sbatch={"output": "/var/log/%j.out"})
    lines = script(replace(request, cluster=cluster)).splitlines()
    assert "#SBATCH --output=/var/log/%j.out" in lines
    assert not any("_log.out" in line for line in lines)
