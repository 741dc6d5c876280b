"""Linear layers that no format quantizes, by the names that config.json has to list, and what a refusal says."""

from checkpoints_convert.formats.quantized_linear import Grid
from checkpoints_convert.formats.words import codes_of_a_word
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import Problem


def kept_modules(model: ModelConfig) -> list[str]:
    """The output layer, and of a mixture-of-experts model the routers and the gates of shared experts.

    Full names: readers compare them as a whole (compressed-tensors), as the end or a regular expression (transformers),
    or as a part of a name (vLLM's AWQ), where ``gate`` alone would also be ``gate_proj``.
    """
    names = ["lm_head"]
    if model.is_moe:
        for layer in range(model.num_layers):
            names.append(f"model.layers.{layer}.mlp.gate")
            if model.moe_shared_expert_gate:
                names.append(f"model.layers.{layer}.mlp.shared_expert_gate")
    return names


def grid_shape_problem(name: str, shape: tuple[int, int], grid: Grid, *, words_along_rows: bool) -> Problem | None:
    """Why a grid, or words of its codes, cannot hold a weight of [out, in]; None if they can.

    Args:
        name: of the weight.
        shape: its shape.
        grid: its groups and bits.
        words_along_rows: whether words hold codes of consecutive rows as well (GPTQ's zeros, AWQ).
    """
    rows, columns = shape
    shown = f"{rows:,} x {columns:,}"
    if grid.group is not None and columns % grid.group:
        fits = [size for size in (64, 32) if size < grid.group and columns % size == 0]
        ways = [f"--group-size {fits[0]}"] if fits else []
        if name.endswith("down_proj.weight"):
            ways.append("--pad-ffn auto, which adds zeros to the feed-forward")
        ways.append("a format without groups (w8a8, fp8)")
        fix = f"has {columns:,} input columns, which is no multiple of the group of {grid.group}: choose "
        return Problem(name, shown, f"{fix}{', or '.join(ways)}.")
    word = codes_of_a_word(grid.bits)
    if words_along_rows and rows % word:
        fix = f"has {rows:,} rows, and {word} of them share a 32-bit word: choose w4a16, w8a8 or fp8, which take any."
        return Problem(name, shown, fix)
    if columns % word:
        fix = f"has {columns:,} input columns, and {word} of them share a 32-bit word: choose w8a8 or fp8."
        return Problem(name, shown, fix)
    return None
