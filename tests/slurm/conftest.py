"""One real cluster for all tests of this directory, and runs on it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, missing_programs, running
from tests.slurm.runs import Runs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """munged, slurmctld and four slurmd with fake GPUs."""
    if missing := missing_programs():
        reason = f"Slurm is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def runs(cluster: SlurmCluster, tokens: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Submits tiny runs to the cluster."""
    return Runs(cluster, tokens, tokenizer, tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def whole_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test on the cluster begins with four idle nodes and leaves no job behind."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()
