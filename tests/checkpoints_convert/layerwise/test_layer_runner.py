"""Inputs of linears, layer by layer, are those that the whole model gives them."""

import pytest
import torch
import transformers

from checkpoints_convert.layerwise.layer_runner import LayerRunner
from checkpoints_convert.layerwise.layered_hf import HfLayers
from checkpoints_convert.layerwise.residual_stream import StreamInMemory
from checkpoints_convert.layerwise.workers import Workers, usable_cores
from tests.checkpoints_convert.quantize.trained import made, opened, tokens

CPU = torch.device("cpu")
IDS = tokens(5, 32, seed=4)


def runner_of(source, workers):
    layers = HfLayers(source.weights, source.config, dtype=torch.float32, place=CPU)
    runner = LayerRunner(layers, IDS, StreamInMemory(len(IDS)), workers=workers, place=CPU)
    runner.embed()
    return runner


def inputs_of(runner, names):
    found = {name: [] for name in names}
    runner.watch({name: found[name].append for name in names})
    return {name: torch.cat(parts) if parts else torch.empty(0) for name, parts in found.items()}


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_inputs_are_those_of_the_whole_model(name, tmp_path_factory):
    directory = made(name, tmp_path_factory)
    linears = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = {}
    for index, layer in enumerate(model.model.layers):
        for linear in linears:
            layer.get_submodule(linear).register_forward_pre_hook(
                lambda module, given, key=(index, linear): expected.update({key: given[0].flatten(0, 1)})
            )
    with torch.no_grad():
        model(input_ids=IDS)
    with Workers(2) as workers:
        runner = runner_of(opened(directory), workers)
        for index in range(2):
            runner.load(index)
            for linear, found in inputs_of(runner, linears).items():
                assert torch.allclose(found, expected[index, linear], atol=1e-4), (index, linear)
            runner.advance(index + 1)


def test_experts_see_only_the_tokens_that_are_routed_to_them(tmp_path_factory):
    with Workers(2) as workers:
        runner = runner_of(opened(made("qwen3_moe", tmp_path_factory)), workers)
        runner.load(0)
        names = [f"mlp.experts.{index}.gate_proj" for index in range(4)]
        all_tokens = inputs_of(runner, ["mlp"])["mlp"]
        found = inputs_of(runner, names)
        router = runner.layers.loaded.mlp.gate.weight
        chosen = (all_tokens @ router.t()).topk(2).indices
        assert chosen.unique().numel() > 1
        for index, name in enumerate(names):
            assert torch.equal(found[name], all_tokens[(chosen == index).any(1)].reshape(found[name].shape))


def test_the_number_of_workers_changes_no_bit(tmp_path_factory):
    source = opened(made("qwen2_moe", tmp_path_factory))
    names = ["self_attn.o_proj", "mlp.experts.1.down_proj", "mlp.shared_expert.down_proj"]
    results = []
    for count in (1, 3):
        with Workers(count) as workers:
            runner = runner_of(source, workers)
            runner.load(0)
            inputs = inputs_of(runner, names)
            runner.advance(1)
            results.append([*inputs.values(), *(runner.stream.read(index) for index in range(len(IDS)))])
    assert all(map(torch.equal, *results))


def test_a_pass_ends_where_the_inputs_are_known(tmp_path_factory):
    with Workers(1) as workers:
        runner = runner_of(opened(made("qwen2", tmp_path_factory)), workers)
        runner.load(0)
        met = []
        runner.layers.loaded.mlp.register_forward_pre_hook(lambda module, given: met.append(1))
        inputs_of(runner, ["self_attn.q_proj"])
        assert not met
        inputs_of(runner, ["mlp.up_proj"])
        assert len(met) == len(IDS)


def test_a_replaced_weight_computes(tmp_path_factory):
    with Workers(1) as workers:
        runner = runner_of(opened(made("qwen2", tmp_path_factory)), workers)
        runner.load(0)
        runner.replace("mlp.down_proj", torch.zeros(128, 256))
        runner.replace("self_attn.o_proj", torch.zeros(128, 128))
        before = runner.stream.read(0).clone()
        runner.advance(1)
        assert torch.equal(runner.stream.read(0), before)


def test_workers_give_results_in_order_and_pass_errors_on():
    with Workers(2) as workers:
        assert workers.map(lambda item: item * item, range(20)) == [item * item for item in range(20)]
        assert workers.map(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
        with pytest.raises(ZeroDivisionError):
            workers.map(lambda item: 1 // item, [1, 0])
    assert usable_cores() >= 1
