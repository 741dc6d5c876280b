"""Whether a run can continue with the data that is asked for now; asked before anything is replaced."""

import json

from megatron_qwen.checkpoint import find
from megatron_qwen.checkpoint.paths import STATE
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.errors import CheckpointError
from megatron_qwen.rundir import RunDirectory


def require_continues(data: TrainingData, directory: RunDirectory) -> None:
    """Tries the ledger of the newest checkpoint, where there is one, on the data.

    Args:
        data: as a run would begin with it.
        directory: of the run.

    Raises:
        ConfigError: the blend misses the stage under way.
        DataError: a source has other tokens than those that the run has read.
    """
    try:
        newest = find.resolve(directory.checkpoints)[0]
        saved = json.loads((newest.path / STATE).read_text())
    except (CheckpointError, OSError, ValueError):
        return  # nothing to resume from, or nothing that can be read: the ranks say what follows from that
    if "data" in saved:
        data.resume(saved["data"])
