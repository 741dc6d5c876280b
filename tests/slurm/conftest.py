"""One real cluster for all tests of this directory, and runs on it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_qwen.resilience.quarantine import NAME
from tests.slurm.cluster import SlurmCluster, missing_programs, running
from tests.slurm.runs import Runs


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """munged, slurmctld and four slurmd with fake GPUs."""
    if missing := missing_programs():
        reason = f"Slurm is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # Not below pytest's own directory, which it closes to other users: they ask a cluster too.
    with tempfile.TemporaryDirectory(prefix="mq_slurm_") as place:
        Path(place).chmod(0o755)
        with running(Path(place)) as cluster:
            yield cluster


@pytest.fixture(scope="session")
def runs(cluster: SlurmCluster, tokens: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Submits tiny runs to the cluster."""
    return Runs(cluster, tokens, tokenizer, tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def whole_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test begins with four idle nodes and leaves no job, and no node in quarantine, behind."""
    tries = getattr(request.node, "execution_count", 1)  # of pytest-rerunfailures
    runs = request.getfixturevalue("runs") if tries > 1 and "runs" in request.fixturenames else None
    if runs is not None:  # the runs of the first try are there still, under their names
        own, runs.root = runs.root, runs.root / f"try_{tries}"
        runs.root.mkdir(exist_ok=True)
    yield
    if "runs" in request.fixturenames:
        shutil.rmtree(request.getfixturevalue("runs").root / NAME, ignore_errors=True)
    if runs is not None:
        runs.root = own
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()
