"""What local checkpoints take of a node, and what is worth knowing about them before a job is submitted."""

from collections.abc import Iterator

from launch.estimates import RunPrediction
from launch.finding import Finding, error, warning
from launch.request import SubmitRequest
from megatron_qwen.errors import Problem

_MEMORY = "/dev/shm"
# Of every piece there is the newest whole one and the one being written, each here and on the partner's node; and the
# copy in the memory of the process.
_FILES, _STAGED = 4, 1


def bytes_per_node(request: SubmitRequest, prediction: RunPrediction) -> tuple[float, float]:
    """Bytes of files on a node, and of copies in the memory of its ranks.

    The pieces of all ranks together are as large as a checkpoint: each has what its optimizer updates.
    """
    share = prediction.checkpoint / request.nodes
    return share * (_FILES if request.nodes > 1 else _FILES / 2), share * _STAGED


def figure(request: SubmitRequest, prediction: RunPrediction) -> list[tuple[str, str]]:
    """The line of a dry run."""
    checkpoint = request.config.checkpoint
    if checkpoint.local_interval is None:
        return []
    files, staged = bytes_per_node(request, prediction)
    where = f"{files / 1e9:,.1f} GB in {checkpoint.local_dir} and {staged / 1e9:,.1f} GB of memory on each node"
    return [("local checkpoints", f"every {checkpoint.local_interval} iterations, {where}")]


def local_findings(request: SubmitRequest, prediction: RunPrediction) -> Iterator[Finding]:
    """Whether they fit, and whether they help."""
    checkpoint, cluster = request.config.checkpoint, request.cluster
    if checkpoint.local_interval is None:
        return
    if "%n" not in checkpoint.local_dir and request.run_dir.is_relative_to(checkpoint.local_dir):
        fix = "holds the run directory, which all nodes share; use memory (/dev/shm) or a disk of the node."
        yield error(Problem("checkpoint.local_dir", checkpoint.local_dir, fix))
    if request.nodes == 1:
        fix = (
            "keeps no copy of a local checkpoint on another node, because there is one node: a lost rank costs at most "
            "that many iterations, a lost node all since the last checkpoint."
        )
        yield warning(Problem("checkpoint.local_interval", checkpoint.local_interval, fix))
    if cluster.memory_per_rank_gib is None or not checkpoint.local_dir.startswith(_MEMORY):
        return
    files, staged = bytes_per_node(request, prediction)
    memory = cluster.memory_per_rank_gib * request.ranks_per_node * 2**30
    if files + staged > memory / 2:
        fix = (
            f"is memory: local checkpoints take {files / 1e9:,.1f} GB of it and {staged / 1e9:,.1f} GB more in the "
            f"ranks, of {memory / 1e9:,.1f} GB of a node (memory_per_rank_gib); use a disk of the node, or more nodes."
        )
        yield warning(Problem("checkpoint.local_dir", checkpoint.local_dir, fix))
