"""AWQ: what is folded changes nothing, and what is searched is found."""

import pytest
import torch

from checkpoints_convert.formats.quantized_format import is_quantized
from checkpoints_convert.formats.quantized_linear import Grid
from checkpoints_convert.layerwise.layer_runner import LayerRunner
from checkpoints_convert.layerwise.layered_hf import HfLayers
from checkpoints_convert.layerwise.residual_stream import StreamInMemory
from checkpoints_convert.layerwise.workers import Workers
from checkpoints_convert.quantize import awq
from checkpoints_convert.quantize.awq import AwqOptions, candidate_scales, clipped_nearest, output_error, scale_errors
from checkpoints_convert.quantize.folding import FoldedWeights, folds
from checkpoints_convert.quantize.layer_solution import CalibratedLayer
from tests.checkpoints_convert.quantize.correlated import CPU, error_of, statistics_of, weight_and_inputs
from tests.checkpoints_convert.quantize.trained import made, opened, put, samples, tokens
from tests.tiers import cases

GRID = Grid(4, 128, False, torch.float16)
WEIGHT, INPUTS = weight_and_inputs()
STATISTICS = statistics_of(INPUTS)
HESSIAN = STATISTICS.hessian()


def loaded(source, workers):
    ids = samples(8).ids
    layers = HfLayers(source.weights, source.config, dtype=torch.float32, place=CPU)
    runner = LayerRunner(layers, ids, StreamInMemory(len(ids)), workers=workers, place=CPU)
    runner.embed()
    runner.load(0)
    return CalibratedLayer(0, source.weights, runner, budget=1 << 20)


def test_candidates():
    means = torch.tensor([0.0, 0.25, 1.0, 16.0])
    found = candidate_scales(means, AwqOptions())
    assert len(found) == 20
    assert torch.equal(found[0], torch.ones(4))
    # mean^(1/2), then the largest is the inverse of the smallest.
    expected = torch.tensor([0.25, 1.0, 16.0]).sqrt()
    assert torch.allclose(found[10][1:], expected / (expected.max() * expected.min()).sqrt())
    assert all(float(scales[0]) == 1 for scales in found), "a channel without input"
    assert torch.equal(candidate_scales(torch.zeros(4), AwqOptions())[0], torch.ones(4))


def test_error_is_that_of_the_outputs():
    rounded = GRID.nearest(WEIGHT).values()
    found = output_error(rounded - WEIGHT, HESSIAN) / 2 / len(WEIGHT)
    assert found == pytest.approx(error_of(rounded, WEIGHT, INPUTS), rel=1e-3)


def test_the_best_exponent_is_that_of_the_smallest_output_error():
    candidates = candidate_scales(STATISTICS.mean_absolute, AwqOptions())
    found = scale_errors(WEIGHT, HESSIAN, candidates, GRID)
    measured = [error_of(GRID.nearest(WEIGHT * scales).values() / scales, WEIGHT, INPUTS) for scales in candidates]
    assert int(found.argmin()) == measured.index(min(measured)) > 0
    assert min(measured) < measured[0]


def test_clipping_never_raises_its_error():
    # A few weights stand out, so that clipping them is worth it in some groups.
    weight = WEIGHT.clone()
    weight[::7, 5] *= 6
    blocks = torch.stack([HESSIAN[:128, :128], HESSIAN[128:, 128:]])

    def errors(found):
        difference = (found.values() - weight).unflatten(1, (2, 128))
        return (torch.einsum("rgi,gij->rgj", difference, blocks) * difference).sum(2)

    plain, clipped = (errors(clipped_nearest(weight, blocks, GRID, AwqOptions(clip=clip))) for clip in (False, True))
    assert torch.equal(plain, errors(GRID.nearest(weight)))
    # Up to the rounding of sums.
    assert (clipped <= plain * 1.0001).all()
    assert float((clipped < plain * 0.99).float().mean()) > 0.1


@pytest.mark.parametrize("name", cases(["qwen2 full heads", "qwen2_moe"], ["qwen2", "qwen3", "qwen3_moe"]))
def test_folding_alone_changes_nothing(name, tmp_path_factory):
    """With all scales of a layer folded and nothing rounded, the model computes the same."""
    import transformers

    directory = made(name, tmp_path_factory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokens(2, 32, seed=9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with Workers(1) as workers:
            layer = loaded(opened(directory), workers)
            weights = FoldedWeights(layer)
            for fold in folds(layer):
                weights.apply(fold, torch.rand(fold.columns) * 4 + 0.2)
            linears = [name for stage in layer.stages for group in stage for name in group.linears]
            changed = {f"{linear}.weight": weights.linear(linear) for linear in linears} | dict(weights.changed)
            replaced = {f"model.layers.0.{name}": value for name, value in changed.items()}
        assert sum("layernorm" in name for name in replaced) == 2
        put(model, replaced)
        found = model(input_ids=ids).logits
        assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
        # Negative control: one tensor that was not folded is seen.
        put(model, {"model.layers.0.input_layernorm.weight": layer.weight("input_layernorm.weight")})
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-2 * float(expected.abs().max()))


def test_what_is_folded_where(tmp_path_factory):
    with Workers(1) as workers:
        producers = {
            name: [fold.producer for fold in folds(loaded(opened(made(name, tmp_path_factory)), workers))]
            for name in ("qwen2", "qwen2 full heads", "qwen2_moe")
        }
    # v_proj only where every query head has its own key-value head.
    norms = ["input_layernorm", "post_attention_layernorm"]
    assert producers["qwen2"] == [*norms, "mlp.up_proj"]
    assert producers["qwen2 full heads"] == [norms[0], "self_attn.v_proj", norms[1], "mlp.up_proj"]
    experts = [f"mlp.experts.{index}.up_proj" for index in range(4)]
    assert sorted(producers["qwen2_moe"]) == sorted([*norms, *experts, "mlp.shared_expert.up_proj"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_the_format_of_the_source(dtype, tmp_path_factory):
    """The columns make up for the rounding of the norm's weight."""

    class Rounded:
        def __init__(self, inner):
            self.inner = inner
            self.tensors = {name: type(info)(info.shape, dtype) for name, info in inner.tensors.items()}

        def rows(self, name, start, stop):
            return self.inner.rows(name, start, stop).to(dtype)

    source = opened(made("qwen2", tmp_path_factory))
    with Workers(1) as workers:
        inner = loaded(source, workers)
        layer = CalibratedLayer(0, Rounded(source.weights), inner.runner, budget=1 << 20)
        weights = FoldedWeights(layer)
        weights.apply(folds(layer)[0], torch.rand(128) + 0.5)
        norm = weights.changed["input_layernorm.weight"]
        assert norm.dtype == dtype
        before = layer.weight("input_layernorm.weight") * layer.weight("self_attn.q_proj.weight")
        assert torch.allclose(norm.float() * weights.linear("self_attn.q_proj"), before, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe"])
def test_a_layer_has_a_lower_error_than_nearest(name, tmp_path_factory):
    source = opened(made(name, tmp_path_factory))
    with Workers(2) as workers:
        layer = loaded(source, workers)
        inputs = {}
        groups = [group for stage in layer.stages for group in stage]
        layer.runner.watch({group.watched: inputs.setdefault(group.watched, []).append for group in groups})
        solution = awq.solve_layer(layer, GRID, AwqOptions())
        weights = FoldedWeights(layer)
        totals = [0.0, 0.0]
        for group in groups:
            given = torch.cat(inputs[group.watched])
            for linear in group.linears:
                weight = layer.weight(f"{linear}.weight")
                rounded = solution.linears[f"{linear}.weight"]
                assert is_quantized(f"model.layers.0.{linear}.weight")
                if group.linears[0].endswith("q_proj"):
                    norm = layer.weight("input_layernorm.weight") / solution.changed["input_layernorm.weight"]
                    ours = error_of(rounded.values() / norm, weight, given)
                    nearest = error_of(GRID.nearest(weight), weight, given)
                    totals[0] += ours
                    totals[1] += nearest
        assert weights.changed == {}
        assert totals[0] < totals[1]
