"""GPTQ and AWQ directories as gptqmodel reads them, through transformers and optimum, and alone."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.formats.awq import Awq
from checkpoints_convert.formats.gptq import Gptq
from checkpoints_convert.formats.quantized_format import QuantizedFormat, is_quantized
from checkpoints_convert.formats.quantized_linear import QuantizedLinear
from checkpoints_convert.model_source import open_model_source
from checkpoints_convert.quantize.run import QuantizeOptions, quantize
from tests.checkpoints_convert.formats.weights import fitting_model, logits, with_weights
from tests.checkpoints_convert.models import with_tokenizer
from tests.conftest import ROOT, environment
from tests.tiers import THOROUGH, cases

pytestmark = pytest.mark.skipif(not THOROUGH, reason="thorough tier: gptqmodel takes minutes")
# In float32: 1.8e-3 to 2.2e-3 were measured, of logits with rms 0.77: it computes in fp16 inside.
LIMIT = 3e-3
FORMATS: dict[str, QuantizedFormat] = {
    "gptq-int4": Gptq(4),
    "awq-int4": Awq(),
    **({"gptq-int8": Gptq(8)} if THOROUGH else {}),
    **({"gptq-int4-v2": Gptq(4, symmetric=False), "gptq-int8-v2": Gptq(8, symmetric=False)} if THOROUGH else {}),
    **({"gptq-int4-act-order": Gptq(4, act_order=True), "gptq-int4-64": Gptq(4, group=64)} if THOROUGH else {}),
}


@dataclass(frozen=True)
class Ordered:
    """Layers with groups of columns that are not consecutive, as act-order makes them."""

    weights: dict[str, torch.Tensor]
    format: Gptq
    digest: str = "ordered"

    def linear(self, name: str) -> QuantizedLinear:
        values = self.weights[name].float()
        order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(1))
        linear = self.format.grid.nearest(values[:, order])
        place = order.argsort()
        return replace(linear, codes=linear.codes[:, place], group_of=(place // self.format.group).to(torch.int32))

    def changed(self, name: str) -> None:
        return None


@pytest.fixture(scope="module", params=cases(["qwen2 fitting"], ["qwen3 fitting tied"]))
def written(request, tmp_path_factory, tokenizer):
    """A directory of each format, and the logits of the model that its codes stand for."""
    root = tmp_path_factory.mktemp("gptqmodel")
    # gptqmodel loads the tokenizer with the weights.
    hf = with_tokenizer(fitting_model(request.param, root / "hf"), tokenizer)
    original = load_file(hf / "model.safetensors")
    expected = {}
    for name, format_ in FORMATS.items():
        assert format_.grid is not None
        solved = Ordered(original, format_) if isinstance(format_, Gptq) and format_.act_order else None
        quantize(open_model_source(hf), root / name, format_, QuantizeOptions("nearest", quiet=True), solved=solved)
        linears = {
            one: solved.linear(one) if solved else format_.grid.nearest(original[one])
            for one in original
            if is_quantized(one)
        }
        expected[name] = logits(with_weights(hf, {one: linear.values() for one, linear in linears.items()}))
    return root, logits(with_weights(hf, {})), expected


@pytest.mark.parametrize("reader", cases(["transformers"], ["gptqmodel"]))
def test_logits(reader, written):
    root, original, expected = written
    found = read(reader, root, list(FORMATS))
    for name, reference in expected.items():
        difference, rounding = (float((reference - other).abs().max()) for other in (found[name], original))
        print(f"{reader}, {name}: {difference:.1e}, of rounding {rounding:.1e}, rms {reference.std():.2f}")
        assert difference <= LIMIT, name
        assert rounding > 2 * LIMIT or "int8" in name, "the check could not tell it from the original"


def read(reader: str, root: Path, names: list[str]) -> dict[str, torch.Tensor]:
    target = root / f"{reader}.safetensors"
    module = "tests.checkpoints_convert.formats.gptqmodel_reader"
    words = [sys.executable, "-m", module, target, reader, *(root / name for name in names)]
    done = subprocess.run(
        [str(word) for word in words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(target)
