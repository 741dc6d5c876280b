"""A save reports through a queue of the process itself."""

from megatron_qwen.core_patches import results_queue


def observe(prepared: bool) -> dict[str, bool]:
    """Whether megatron-core has a queue before its first save, and which it then hands out."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    missing = filesystem_async._results_queue is None  # it would start a manager process
    queue = results_queue.apply() if prepared else None
    same = queue is not None and results_queue.apply() is queue is filesystem_async.get_write_results_queue()
    return {"missing": missing, "same": same}


def test_no_manager_is_started(observed):
    assert observed.plain == {"missing": True, "same": False}
    assert observed.prepared == {"missing": True, "same": True}
