"""The mapping table is one to one, in both directions, and names what transformers names."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_qwen.estimate.parameters import count_parameters
from megatron_qwen.hf.config import architecture_from_hf, hf_config
from megatron_qwen.hf.mapping import TensorMapping, core_tensors, count_hf_tensors, hf_tensors, tensor_mappings
from megatron_qwen.recipes.registry import RECIPES


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe", "tiny_qwen3", "tiny_qwen3_moe", "demo"])
def test_names_are_those_of_transformers(recipe):
    config = RECIPES[recipe]()
    model = config.model
    names = [item.name for item in hf_tensors(model)]
    assert len(names) == len(set(names)) == count_hf_tensors(model)
    content = hf_config(config.architecture, eos_token_id=0, bos_token_id=0, dtype="float32")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
    expected = set(theirs.state_dict())
    if model.is_moe:  # transformers holds a layer's experts as one tensor and reads them one by one
        assert {name for name in names if ".experts." not in name} == {
            name for name in expected if ".experts." not in name
        }
    else:
        assert set(names) == expected - ({"lm_head.weight"} if model.share_embeddings_and_output_weights else set())


# By hand from megatron-core's modules (GPTModel with a mixture of experts, Qwen2-MoE's shared expert with a gate).
CORE_OF_MOE = {
    "embedding.word_embeddings.weight": "padded",
    "decoder.final_layernorm.weight": "",
    "output_layer.weight": "padded",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "layer",
    "decoder.layers.self_attention.linear_qkv.weight": "layer",
    "decoder.layers.self_attention.linear_qkv.bias": "layer",
    "decoder.layers.self_attention.linear_proj.weight": "layer",
    "decoder.layers.pre_mlp_layernorm.weight": "layer",
    "decoder.layers.mlp.router.weight": "layer",
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": "layer, expert",
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": "layer, expert",
    "decoder.layers.mlp.shared_experts.linear_fc1.weight": "layer",
    "decoder.layers.mlp.shared_experts.linear_fc2.weight": "layer",
    "decoder.layers.mlp.shared_experts.gate_weight": "layer",
}


def test_tensors_of_the_checkpoint_their_padding_and_their_leading_dimensions():
    model = replace(RECIPES["tiny_moe"]().model, share_embeddings_and_output_weights=False)
    leading = {(False, False): "", (True, False): "layer", (True, True): "layer, expert"}
    found = {
        mapping.core: "padded" if mapping.padded else leading[mapping.per_layer, mapping.per_expert]
        for mapping in tensor_mappings(model)
    }
    assert found == CORE_OF_MOE
    places = [(item.mapping.core, item.leading) for item in core_tensors(model)]
    layers, experts = range(model.num_layers), range(model.num_moe_experts)
    wanted = {"": [()], "padded": [()], "layer": [(layer,) for layer in layers]}
    wanted["layer, expert"] = [(layer, expert) for layer in layers for expert in experts]
    assert sorted(places) == sorted((core, place) for core, kind in CORE_OF_MOE.items() for place in wanted[kind])


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe"])
def test_the_files_of_an_export_hold_modules_in_the_order_of_transformers(recipe):
    config = RECIPES[recipe]()
    content = hf_config(config.architecture, eos_token_id=0, bos_token_id=0, dtype="float32")
    with torch.device("meta"):
        theirs = list(AutoModelForCausalLM.from_config(AutoConfig.for_model(**content)).state_dict())
    ours = [item.name for item in hf_tensors(config.model)]
    one_by_one = [name for name in ours if ".experts." not in name]
    assert one_by_one == [name for name in theirs if name in set(ours)]
    experts = [name for name in ours if ".experts." in name]
    in_order = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(config.model.num_layers)
        for expert in range(config.model.num_moe_experts or 0)
        for part in ("gate", "up", "down")
    ]
    assert experts == in_order
    places = [ours.index(name) for name in ours if name.startswith("model.layers.")]
    assert places == list(range(1, 1 + len(places))), "the embedding first, then all layers"


def test_each_tensor_of_hugging_face_knows_its_place_in_the_checkpoint():
    model = RECIPES["tiny_moe"]().model
    found = {item.name: item for item in hf_tensors(model)}
    up = found["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert (up.mapping.core, up.leading, up.part) == ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (1, 2), 1)
    norm = found["model.norm.weight"]
    assert (norm.mapping.core, norm.leading, norm.part) == ("decoder.final_layernorm.weight", (), 0)
    assert found["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, model.hidden_size)


def split(mapping: TensorMapping, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The Hugging Face tensors in a checkpoint tensor without leading dimensions."""
    return tuple(torch.cat([tensor[start:stop] for start, stop in ranges]) for ranges in mapping.rows)


def join(mapping: TensorMapping, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The inverse of ``split``."""
    return torch.cat([tensors[part][start:stop] for part, (start, stop) in mapping.origin()])


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe", "tiny_qwen3", "tiny_qwen3_moe"])
def test_split_and_join_are_inverse(recipe):
    model = RECIPES[recipe]().model
    for mapping in tensor_mappings(model):
        tensor = torch.randn(mapping.core_shape)
        parts = split(mapping, tensor)
        assert [part.shape for part in parts] == [mapping.shape(index) for index in range(len(mapping.hf))]
        assert torch.equal(join(mapping, parts), tensor), mapping.core
        assert sorted(row for ranges in mapping.rows for span in ranges for row in range(*span)) == list(
            range(mapping.num_rows)
        ), "a row goes nowhere, or to two places"


def test_query_heads_lie_beside_their_key_and_value():
    """megatron-core's order by its definition: group by group, its query heads, then key, then value."""
    model = RECIPES["tiny_dense"]().model
    mapping = next(mapping for mapping in tensor_mappings(model) if mapping.core.endswith("linear_qkv.bias"))
    d, heads = model.head_dim, model.num_attention_heads // model.num_query_groups
    query, key, value = (torch.arange(1000 * n, 1000 * n + count * d) for n, count in ((1, 4), (2, 2), (3, 2)))
    expected = [
        part
        for group in range(model.num_query_groups)
        for part in (
            query[group * heads * d : (group + 1) * heads * d],
            key[group * d : (group + 1) * d],
            value[group * d : (group + 1) * d],
        )
    ]
    assert torch.equal(join(mapping, (query, key, value)), torch.cat(expected))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "qwen3_235b_a22b"])
def test_config_json_comes_back(recipe):
    config = RECIPES[recipe]()
    model = config.model
    content = hf_config(config.architecture, eos_token_id=0, bos_token_id=0, dtype="bfloat16")
    found = architecture_from_hf(content, where="config.json")
    back = found.model
    # What Hugging Face has no field for.
    training_only = {"scale_output_init": True, "moe_z_loss_coeff": model.moe_z_loss_coeff}
    routing = {} if model.is_moe else {"moe_aux_loss_coeff": model.moe_aux_loss_coeff}
    head_dim = {"kv_channels": model.kv_channels} if back.head_dim == model.head_dim else {}
    assert replace(back, **training_only, **routing, **head_dim) == model
    assert found.rope == config.rope


def test_parameters_of_the_table_are_those_of_the_estimate():
    for name in ("qwen2_5_0_5b", "qwen2_5_72b", "qwen2_57b_a14b", "qwen3_8b", "qwen3_30b_a3b"):
        model = RECIPES[name]().model
        stored = sum(torch.Size(item.mapping.core_shape).numel() for item in core_tensors(model))
        assert stored == count_parameters(model).total, name
