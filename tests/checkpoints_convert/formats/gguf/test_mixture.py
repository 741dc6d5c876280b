"""Types and bytes of every tensor are llama-quantize's, as record_llama_quantize.py recorded them."""

import json

import pytest

from checkpoints_convert.formats.gguf.importances import GivenImportances
from checkpoints_convert.formats.gguf.writing import GgufOptions, write_gguf
from tests.checkpoints_convert.formats.gguf.models import MODELS, importances
from tests.checkpoints_convert.formats.gguf.recorded import RECORD, summary
from tests.tiers import cases

QUANTIZED = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"]
# With narrow models every fallback, with eight experts Mixtral's rules, with four queries a KV head Q2_K's.
QUICK = [
    ("qwen2 narrow", ["F16", "BF16", "Q8_0", "Q4_0", "Q3_K_M"], False),
    ("qwen2 narrow", ["Q4_K_M"], True),
    ("qwen2 tied", ["Q2_K"], False),
    ("qwen2_moe", ["Q3_K_M"], True),
    ("qwen2_moe tied", ["Q5_K_M"], False),
    ("qwen3_moe", ["Q6_K"], False),
]
THOROUGH = [(name, QUANTIZED, weighed) for name in MODELS for weighed in (False, True)]


@pytest.mark.parametrize(("name", "kinds", "weighed"), cases(QUICK, THOROUGH))
def test_llama_quantize_makes_the_same_bytes(side, name, kinds, weighed, tmp_path):
    recorded = json.loads(RECORD.read_text())
    weights = GivenImportances(importances(name)) if weighed else None
    write_gguf(side(name), tmp_path / "out", kinds, GgufOptions(name="m", quiet=True, importances=weights))
    for kind in kinds:
        expected = recorded[f"{name} {kind}{' importances' if weighed else ''}"]
        assert summary(tmp_path / "out" / f"m-{kind}.gguf") == expected, kind
