"""What a save has written is reported through a queue of this process.

Replaces: ``_results_queue`` of ``megatron.core.dist_checkpointing.strategies.filesystem_async``.
Needed: with megatron-core 0.19.2, which starts a manager process for this queue at the first save: its writer may be a
    process of its own. Here it is a thread (checkpoint/write.py), and the manager would outlive a killed rank.
When: before the first save; checkpoint/write.py applies it.
Can go: when ``get_write_results_queue`` can be told that the writer is a thread.
"""

import queue
from typing import Any


def apply() -> "queue.Queue[Any]":
    """Puts a queue there unless one of this kind is there already.

    Returns:
        The queue.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    strategy: Any = filesystem_async
    if not isinstance(strategy._results_queue, queue.Queue):
        strategy._results_queue = queue.Queue()
    results: queue.Queue[Any] = strategy._results_queue
    return results
