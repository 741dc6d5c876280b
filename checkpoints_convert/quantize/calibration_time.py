"""How long a model takes to calibrate, from the measured parts of one layer of any model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from checkpoints_convert.formats.quantized_format import is_quantized
from checkpoints_convert.quantize.calibration_options import CalibrationOptions, Method
from checkpoints_convert.quantize.calibration_progress import LayerSeconds
from checkpoints_convert.quantize.layer_plan import InputGroup, stages
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.hf.mapping import hf_tensors

# Floating-point operations of a multiplication and an addition.
_FMA = 2
# Of an in x in matrix, in in^3: its Cholesky factor 1/3, the inverse by the factor 2/3, and the factor of that 1/3.
_FACTORS = 4 / 3
_PREFIX = "model.layers.0."
_Cost = Callable[[int, int], float]


@dataclass(frozen=True)
class LayerWork:
    """Floating-point operations of calibrating a layer; the parts are those of ``LayerSeconds``.

    Args:
        run: of all passes over the samples.
        sums: of X^T X, of which half is computed.
        solve: of factorising and rounding (GPTQ), or of the search for scales (AWQ).
    """

    run: float
    sums: float
    solve: float


def layer_work(
    model: ModelConfig, method: Method, *, count: int, length: int, options: CalibrationOptions
) -> LayerWork:
    """What a layer of a model takes.

    Args:
        model: its shape; layer 0 stands for all.
        method: that solves it.
        count: sequences.
        length: tokens of each.
        options: of the method.
    """
    tokens = count * length
    shapes = {
        item.name.removeprefix(_PREFIX).removesuffix(".weight"): item.shape
        for item in hf_tensors(model)
        if item.name.startswith(_PREFIX) and is_quantized(item.name)
    }
    share = model.moe_router_topk / model.num_moe_experts if model.num_moe_experts else 1.0
    by_stage = stages((name, shape[1]) for name, shape in shapes.items())

    def over(groups: Iterable[InputGroup], cost: _Cost, *, shared: bool) -> float:
        """Sum of a cost over linears; of an expert's, the part of the tokens that is routed to it."""
        return sum(
            (share if shared and ".experts." in name else 1.0) * cost(*shapes[name])
            for group in groups
            for name in group.linears
        )

    gemms = [over(groups, lambda out, inner: _FMA * tokens * out * inner, shared=True) for groups in by_stage]
    # Scores and their sums over values, of half of the pairs of positions.
    attention = 2 * _FMA * tokens * length / 2 * model.num_attention_heads * model.head_dim
    whole = sum(gemms) + attention
    every = [group for groups in by_stage for group in groups]
    sums = sum(tokens * group.columns**2 * (share if ".experts." in group.watched else 1.0) for group in every)
    if method == "smoothquant":
        return LayerWork(whole - sum(gemms[2:]) + whole, 0.0, 0.0)
    if method == "awq":
        search = over(every, lambda out, inner: _FMA * out * inner**2, shared=False)
        return LayerWork(3 * whole, sums, search * options.awq.exponents)
    # Passes that end at the inputs of o, of gate and up, and of down, then a whole one.
    runs = 4 * (gemms[0] + attention) + 3 * gemms[1] + 2 * gemms[2] + gemms[3]
    rounding = over(every, lambda out, inner: out * inner**2, shared=False)
    return LayerWork(runs, sums, rounding + sum(_FACTORS * group.columns**3 for group in every))


def predicted_seconds(measured: LayerSeconds, work: LayerWork, *, target: LayerWork, layers: int) -> float:
    """Seconds of all layers of a model, at the rates that a layer of another was measured with.

    Larger matrices come closer to the device's peak, so a layer of the model itself, or of its widths, says most.

    Args:
        measured: seconds of a layer (``CalibrationProgress.layer``).
        work: of that layer.
        target: of a layer of the model that is asked for.
        layers: of that model.
    """
    parts = (
        (measured.run, work.run, target.run),
        (measured.sums, work.sums, target.sums),
        (measured.solve, work.solve, target.solve),
    )
    return layers * sum(seconds * (wanted / done if done else 1.0) for seconds, done, wanted in parts)
