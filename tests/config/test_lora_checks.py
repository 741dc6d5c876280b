"""Which settings of LoRA are refused, and what is said."""

import pytest

from megatron_qwen.config.checks import problems
from megatron_qwen.config.lora import targets
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES

BASE = "checkpoint.load=start"
TIED = "model.share_embeddings_and_output_weights=true"
EP2, TP2 = "parallel.expert_model_parallel_size=2", "parallel.tensor_model_parallel_size=2"
WRONG = [
    ("tiny_dense", ["lora.rank=4"], "lora.rank = 4: needs checkpoint.load"),
    ("tiny_dense", [BASE, "lora.rank=4", "lora.target_modules=[]"], "names no layer"),
    ("tiny_dense", [BASE, "lora.rank=4", "lora.target_modules=[q_prj]"], "q_prj: matches nothing of this model"),
    ("tiny_dense", [BASE, "lora.rank=4", "lora.target_modules=[mlp.experts.*]"], "matches nothing"),
    ("tiny_dense", [BASE, TIED, "lora.rank=4", "lora.target_modules=[lm_head]"], "is one matrix with the other, tied"),
    ("tiny_dense", [BASE, "lora.rank=4", "lora.modules_to_save=[norm]"], "must be one of embed_tokens, lm_head"),
    (
        "tiny_dense",
        [BASE, TIED, "lora.rank=4", "lora.modules_to_save=[lm_head]"],
        "(it is embed_tokens: this model's are",
    ),
    (
        "tiny_dense",
        [BASE, "lora.rank=4", "lora.target_modules=[lm_head]", "lora.modules_to_save=[lm_head]"],
        "has an adapter by lora.target_modules",
    ),
    (
        "tiny_dense",
        [BASE, "lora.rank=4", "lora.target_modules=[lm_head]", "parallel.pipeline_model_parallel_size=2"],
        "names no module of a layer",
    ),
    (
        "tiny_moe",
        [BASE, "lora.rank=4", TP2, "parallel.sequence_parallel=true"],
        "expert_tensor_parallel_size = 2: cannot split experts with adapters",
    ),
    (
        "tiny_moe",
        [BASE, "lora.rank=4", EP2, "performance.moe_shared_expert_overlap=true"],
        "calls the shared expert in pieces",
    ),
    ("tiny_dense", [BASE, "lora.rank=4", "performance.cuda_graph_impl=local"], "was never run with adapters"),
    ("tiny_dense", [BASE, "lora.rank=4", "performance.fp8_param_gather=true"], "is for weights that are trained"),
    (
        "tiny_dense",
        [
            BASE,
            "lora.rank=4",
            "objective.kind=sft",
            "data.tokenizer=tok",
            'objective.token_descriptions={"<|x|>": "a"}',
        ],
        "changes rows that LoRA freezes; add embed_tokens, lm_head to lora.modules_to_save",
    ),
]


@pytest.mark.parametrize(("recipe", "words", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_refused(recipe, words, said):
    told = [str(problem) for problem in problems(resolve(recipe, words, RECIPES))]
    assert any(said in one for one in told), told


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_a_rank_is_a_whole_number_from_one(value):
    from megatron_qwen.errors import UserError

    with pytest.raises((UserError, AssertionError), match=r"lora\.rank"):
        assert not (found := problems(resolve("tiny_dense", [f"lora.rank={value}"], RECIPES))), found


NAMES = {
    "all-linear": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "q_proj": "q_proj",
    "self_attn.*": "q_proj k_proj v_proj o_proj",
    "*_proj": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "mlp.up_proj": "up_proj",
    "lm_head": "lm_head",
    "*": "embed_tokens q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
}


@pytest.mark.parametrize(("pattern", "expected"), NAMES.items())
def test_patterns(pattern, expected):
    config = resolve("tiny_dense", [BASE, "lora.rank=4", f"lora.target_modules=['{pattern}']"], RECIPES)
    assert not problems(config)
    assert [target.name.rsplit(".", 1)[-1] for target in targets(config.lora, config.model)] == expected.split()


def test_experts_and_the_shared_expert_are_told_apart():
    for pattern, count in (("mlp.experts.*", 3), ("mlp.shared_expert.*", 3), ("gate_proj", 2), ("all-linear", 10)):
        config = resolve("tiny_moe", [BASE, "lora.rank=4", f"lora.target_modules=['{pattern}']"], RECIPES)
        assert len(targets(config.lora, config.model)) == count


def test_without_a_rank_there_is_no_lora():
    config = resolve("tiny_dense", ["lora.target_modules=[q_proj]"], RECIPES)
    assert not problems(config)
    assert targets(config.lora, config.model) == ()
