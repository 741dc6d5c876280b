"""All recipes by name."""

from collections.abc import Callable

from megatron_qwen.config.run import RunConfig
from megatron_qwen.recipes import dense, instruct, moe, qwen3, small, specialised

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        dense.qwen2_5_0_5b,
        dense.qwen2_5_1_5b,
        dense.qwen2_5_3b,
        dense.qwen2_5_7b,
        dense.qwen2_5_14b,
        dense.qwen2_5_32b,
        dense.qwen2_5_72b,
        moe.qwen1_5_moe_a2_7b,
        moe.qwen2_57b_a14b,
        moe.qwen2_5_turbo_standin,
        moe.qwen2_5_plus_standin,
        instruct.qwen2_5_0_5b_instruct,
        instruct.qwen2_5_1_5b_instruct,
        instruct.qwen2_5_3b_instruct,
        instruct.qwen2_5_7b_instruct,
        instruct.qwen2_5_14b_instruct,
        instruct.qwen2_5_32b_instruct,
        instruct.qwen2_5_72b_instruct,
        instruct.qwen1_5_moe_a2_7b_instruct,
        instruct.qwen2_57b_a14b_instruct,
        instruct.qwen2_5_turbo_standin_instruct,
        instruct.qwen2_5_turbo_standin_instruct_long,
        instruct.qwen2_5_plus_standin_instruct,
        specialised.qwen2_5_coder_0_5b,
        specialised.qwen2_5_coder_1_5b,
        specialised.qwen2_5_coder_3b,
        specialised.qwen2_5_coder_7b,
        specialised.qwen2_5_coder_14b,
        specialised.qwen2_5_coder_32b,
        specialised.qwen2_5_coder_7b_instruct,
        specialised.qwen2_5_coder_32b_instruct,
        specialised.qwen2_5_math_1_5b,
        specialised.qwen2_5_math_7b,
        specialised.qwen2_5_math_72b,
        specialised.qwen2_5_math_1_5b_instruct,
        specialised.qwen2_5_math_7b_instruct,
        specialised.qwen2_5_math_72b_instruct,
        specialised.qwq_32b_sft,
        qwen3.qwen3_0_6b,
        qwen3.qwen3_1_7b,
        qwen3.qwen3_4b,
        qwen3.qwen3_8b,
        qwen3.qwen3_14b,
        qwen3.qwen3_32b,
        qwen3.qwen3_30b_a3b,
        qwen3.qwen3_235b_a22b,
        small.tiny_dense,
        small.tiny_moe,
        small.tiny_qwen3,
        small.tiny_qwen3_moe,
        small.demo,
    )
}
