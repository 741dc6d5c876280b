"""Which kernels are chosen, and why not others."""

import importlib
import sys

import pytest

from megatron_qwen.models import apex_kernels
from megatron_qwen.models.te_backend import provider as te_backend


def put_apex(folder, *parts: str) -> None:
    for name in ("apex", *(f"apex/{part}" for part in parts)):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('never import me')\n")


def test_the_apex_of_pypi_is_recognised_and_ignored(tmp_path, monkeypatch):
    assert not apex_kernels.foreign_apex_is_here()
    put_apex(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert apex_kernels.foreign_apex_is_here()
    assert not apex_kernels.nvidia_apex_is_here()
    assert "apex" not in sys.modules


def test_nvidias_apex_needs_its_extensions(tmp_path, monkeypatch):
    put_apex(tmp_path, "optimizers")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert not apex_kernels.foreign_apex_is_here()
    assert not apex_kernels.nvidia_apex_is_here()
    for name in ("amp_C", "fused_weight_gradient_mlp_cuda"):
        (tmp_path / f"{name}.py").write_text("")
    importlib.invalidate_caches()
    assert apex_kernels.nvidia_apex_is_here()


def test_says_what_te_lacks(monkeypatch):
    monkeypatch.setattr(te_backend.device, "has_cuda", lambda: False)
    assert te_backend.why_not() == "there is no CUDA device"
    monkeypatch.setattr(te_backend.device, "has_cuda", lambda: True)
    monkeypatch.setattr(te_backend.importlib.util, "find_spec", lambda name: None)
    assert te_backend.why_not() == "transformer_engine is not installed (./mq setup --gpu)"


@pytest.mark.parametrize(
    ("capability", "recipe", "lacking"),
    [
        ((9, 0), "delayed", None),
        ((8, 9), "tensorwise", None),
        ((8, 0), "tensorwise", "FP8 needs an Ada, Hopper or newer GPU"),
        ((9, 0), "mxfp8", "mxfp8 needs a Blackwell GPU"),
        ((10, 0), "mxfp8", None),
    ],
)
def test_says_what_a_gpu_lacks_for_fp8(capability, recipe, lacking, monkeypatch):
    monkeypatch.setattr(te_backend.device, "compute_capability", lambda: capability)
    assert te_backend.why_not_fp8(recipe) == lacking
