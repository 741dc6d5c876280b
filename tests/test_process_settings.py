"""Settings of a process: made once, and those of its own kind of device."""

import os
import warnings

from megatron_qwen import process_settings


def test_made_twice_as_made_once(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    with warnings.catch_warnings():
        process_settings.apply(gpu=False)
        made = list(warnings.filters)
        process_settings.apply(gpu=False)
        assert warnings.filters == made
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_a_gpus_allocator_is_told_unless_the_user_has(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    with warnings.catch_warnings():
        process_settings.apply(gpu=True)
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
        process_settings.apply(gpu=True)
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")


def test_notices_of_megatron_core_are_hidden():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        process_settings.hide_notices()
        warnings.warn_explicit("no apex", UserWarning, "optimizer.py", 1, module="megatron.core.optimizer")
        warnings.warn_explicit("ours", UserWarning, "run.py", 1, module="megatron_qwen.run")
    assert [str(one.message) for one in shown] == ["ours"]
