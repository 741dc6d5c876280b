"""What somebody wants submitted: a configuration, a cluster, a number of nodes, a name, a place."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from launch import cluster as clusters
from launch.cluster import Cluster
from megatron_qwen import slurm
from megatron_qwen.config.run import RunConfig, with_paths
from megatron_qwen.config.source import resolve
from megatron_qwen.config.world import smallest_world
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.recipes.registry import RECIPES

NAME_RULE = "must be letters, digits, '.', '_' and '-', at most 100, the first a letter or digit."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class SubmitRequest:
    """One run on one cluster.

    Args:
        name: of the run; its jobs carry it.
        config: resolved.
        cluster: as its file says, with what the command line changes.
        cluster_name: how it was named.
        nodes: of a job that run ranks.
        run_dir: the run directory.
        chain: jobs that follow one another; None for one that requeues itself until the run is done.
        environ: the submitting shell's variables.
        spares: further nodes of a job, for those that fail.
    """

    name: str
    config: RunConfig
    cluster: Cluster
    cluster_name: str
    nodes: int
    run_dir: Path
    chain: int | None
    environ: dict[str, str]
    spares: int = 0

    @property
    def ranks_per_node(self) -> int:
        """Tasks of a node; on a single machine as many as the layout needs, where its file does not say."""
        cluster = self.cluster
        if cluster.scheduler == "local" and not (cluster.ranks_per_node or cluster.gpus_per_node):
            return smallest_world(self.config)
        return cluster.ranks

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks_per_node

    @property
    def job_nodes(self) -> int:
        """Nodes that a job asks for."""
        return self.nodes + self.spares


def make(
    source: str,
    overrides: list[str],
    *,
    nodes: int,
    cluster: str | None,
    name: str | None = None,
    run_dir: Path | None = None,
    time_limit: str | None = None,
    ranks_per_node: int | None = None,
    chain: int | None = None,
    spares: int = 0,
    dry: bool = False,
) -> SubmitRequest:
    """Reads what was asked for.

    Args:
        source: recipe or run.yaml.
        overrides: ``section.field=value``.
        nodes: of a job.
        cluster: name or path of a cluster file; None picks one.
        name: of the run; None is the recipe's.
        run_dir: None is the cluster's run root and the name.
        time_limit: instead of the cluster's.
        ranks_per_node: instead of the cluster's.
        chain: number of jobs in a row.
        spares: further nodes of a job.
        dry: nothing will be submitted: without Slurm, and without a cluster, the example cluster serves.

    Raises:
        ConfigError: with everything that cannot be read.
    """
    problems: list[Problem] = []
    if nodes < 1:
        problems.append(Problem("--nodes", nodes, "must be at least 1."))
    if spares < 0:
        problems.append(Problem("--spares", spares, "must be at least 0."))
    if chain is not None and chain < 1:
        problems.append(Problem("--chain", chain, "must be at least 1."))
    named = name or (source if source in RECIPES else Path(source).resolve().parent.name)
    if not _NAME.fullmatch(named):
        problems.append(Problem("--name", repr(named), NAME_RULE))
    chosen = chosen_cluster(cluster, dry=dry)
    described: Cluster | None = None
    config: RunConfig | None = None
    try:
        described = clusters.load(chosen)
        instead = {"time_limit": time_limit, "ranks_per_node": ranks_per_node}
        if given := {field: value for field, value in instead.items() if value is not None}:
            described = clusters.changed(described, **given)
    except ConfigError as error:
        problems += error.problems
    try:
        config = absolute_paths(resolve(source, overrides, RECIPES))
    except ConfigError as error:
        problems += error.problems
    if described is not None and described.scheduler == "local" and nodes > 1:
        problems.append(
            Problem("--nodes", nodes, f"the cluster {chosen} is one machine; use 1, or name another cluster.")
        )
    if described is not None and described.scheduler == "local" and chain is not None:
        problems.append(Problem("--chain", chain, f"cluster {chosen} has no queue for waiting jobs."))
    if described is not None and described.scheduler == "local" and spares:
        problems.append(Problem("--spares", spares, f"the cluster {chosen} is one machine; leave it out."))
    if problems:
        raise ConfigError(problems)
    assert described is not None
    assert config is not None
    where = run_dir if run_dir is not None else Path(described.run_root) / named
    return SubmitRequest(named, config, described, chosen, nodes, where.absolute(), chain, dict(os.environ), spares)


def chosen_cluster(named: str | None, *, dry: bool = False) -> str:
    """The cluster that is meant: the one named, else the example on a machine with Slurm, else this machine."""
    return named or (clusters.EXAMPLE if dry or slurm.is_there() else clusters.LOCAL)


def with_name(request: SubmitRequest, name: str, config: RunConfig) -> SubmitRequest:
    """The same request for another run next to it.

    Raises:
        ConfigError: the name could lead elsewhere.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(Problem("name", repr(name), NAME_RULE))
    return replace(request, name=name, config=config, run_dir=request.run_dir.parent / name)


def absolute_paths(config: RunConfig) -> RunConfig:
    """Paths as they are from here; what run.yaml says must hold from any directory."""

    def absolute(path: str) -> str:
        return path if "://" in path else os.path.abspath(path)  # noqa: PTH100 (links stay as they were given)

    return with_paths(config, absolute)
