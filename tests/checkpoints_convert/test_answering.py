"""The release of a model that was fine-tuned to answer: it stops where a turn ends, as Qwen2.5's instruct models do."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_convert.checkpoint_source import open_checkpoint
from checkpoints_convert.formats.gguf.reading import GgufFile
from checkpoints_convert.to_hf import ExportOptions, export
from launch.demo import standard_library
from megatron_qwen.config.source import resolve
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import ConfigError, ConversionError
from megatron_qwen.hf.sampling import SAMPLING
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import run
from tests.data.chat.conftest import template
from tests.training.attempts import attempt
from tools.generation.stated_sampling import stated_sampling

QUESTION = [{"role": "system", "content": "."}, {"role": "user", "content": "Say yes."}]
ANSWER = {"role": "assistant", "content": "yes"}
SHOWN = ("temperature", "top_k", "top_p", "repetition_penalty")


@pytest.fixture(scope="module")
def tuned(pool, tmp_path_factory):
    """A run that has learnt one answer, from a base whose files name the end of documents."""
    root = tmp_path_factory.mktemp("release")
    lines = [json.dumps({"text": document["text"]}) + "\n" for document in standard_library(200_000)]
    (root / "text.jsonl").write_text("".join(lines))
    words = ("--vocab-size", 512, "--output", root / "tok", root / "text.jsonl")
    run("tools.data", "tokenizer", "train", *words, check=True)
    (root / "tok" / "chat_template.jinja").write_text(template("qwen2_5"))
    (root / "tok" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": end_of_text(root), "do_sample": False})
    )
    (root / "chats.jsonl").write_text((json.dumps({"messages": [*QUESTION, ANSWER]}) + "\n") * 64)
    words = ("--chat", "--tokenizer", root / "tok", "--output", root / "chats", root / "chats.jsonl")
    run("tools.data", "prepare", *words, check=True)
    data = [f"data.path={root / 'chats'}", f"data.tokenizer={root / 'tok'}", "data.seq_length=64"]
    batch = ["training.global_batch_size=8", "training.micro_batch_size=8", "data.validation_fraction=0.2"]
    length = ["training.train_iters=40", "training.eval_iters=1", "optim.learning_rate=3e-3", "optim.lr_warmup_iters=0"]
    words = ["objective.kind=sft", "model.vocab_size=512", *data, *batch, *length]
    attempt(pool, 1, resolve("tiny_dense", words, RECIPES), root / "run")
    return root


def end_of_text(root):
    return load_tokenizer(root / "tok").end_of_text


@pytest.fixture(scope="module")
def released(tuned):
    export(open_checkpoint(tuned / "run"), tuned / "hf", ExportOptions(quiet=True))
    return tuned / "hf"


def test_the_files_are_those_of_an_instruct_model(tuned, released):
    turn = load_tokenizer(tuned / "tok").spellable["<|im_end|>"]
    config, generation, tokenizer = (
        json.loads((released / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    assert config["eos_token_id"] == turn
    assert generation["eos_token_id"] == [turn, end_of_text(tuned)]
    assert {name: generation[name] for name in SAMPLING} == SAMPLING
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert (released / "chat_template.jinja").read_text() == template("qwen2_5")
    before = json.loads((tuned / "tok" / "tokenizer_config.json").read_text())
    changed = {"eos_token", "pad_token"}
    assert {name: value for name, value in tokenizer.items() if name not in changed} == {
        name: value for name, value in before.items() if name not in changed
    }


def test_the_card_names_stage_data_and_scores(released):
    card = (released / "README.md").read_text()
    assert "| Stage | supervised fine-tuning, mean over tokens |" in card
    assert "`chats` (" in card
    assert "xxh3-128" in card
    assert "| `validation_end_probability` | " in card
    assert "apply_chat_template" in card


def test_the_card_names_the_objective_of_preferences(tuned, tmp_path):
    source = open_checkpoint(tuned / "run")
    for words, said in [
        ({"kind": "dpo", "beta": 0.3}, "| Stage | preferences between answers, dpo with sigmoid loss, beta 0.3 |"),
        ({"kind": "orpo"}, "| Stage | preferences between answers, orpo, beta 0.1 |"),
    ]:
        config = source.config.with_section("objective", **words)
        out = tmp_path / config.objective.kind
        export(replace(source, config=config), out, ExportOptions(quiet=True))
        assert said in (out / "README.md").read_text()


def test_transformers_answers_and_stops(released):
    """By the card's own lines."""
    tokenizer, model = (kind.from_pretrained(released) for kind in (AutoTokenizer, AutoModelForCausalLM))
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    torch.manual_seed(0)
    answer = model.generate(**prompt)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "yes<|im_end|>"


def test_generate_samples_as_the_files_say(tuned, released):
    expected = {name: SAMPLING[name] for name in SHOWN}
    assert stated_sampling(tuned / "run") == stated_sampling(released) == expected
    assert stated_sampling(tuned / "run" / "checkpoints") == expected
    words = ("--chat", "--system", ".", "--prompt", "Say yes.", "--max-new-tokens", 20)
    for source in (tuned / "run", released):
        done = run("tools.generate", source, *words, "--json", check=True)
        assert "sampled as the model's files say: temperature 0.7" in done.stderr
        assert json.loads(done.stdout)[0]["text"] == "yes"
    plain = run("tools.generate", released, "--prompt", "def", "--max-new-tokens", 2, check=True)
    assert "files say" not in plain.stderr
    ours = run("tools.generate", released, *words, "--temperature", 0, check=True)
    assert "temperature" not in ours.stderr


def test_the_release_is_that_of_the_run(tuned, released, tmp_path):
    """``mq convert verify`` knows which file the export changes, and sees another change of it."""
    done = run("checkpoints_convert.convert", "verify", tuned / "run", released, "--logits")
    assert done.returncode == 0, done.stdout
    shutil.copytree(released, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"<|im_end|>"', '"<|im_start|>"', 1))
    done = run("checkpoints_convert.convert", "verify", tuned / "run", tmp_path / "other")
    assert done.returncode == 1
    assert "tokenizer_config.json" in done.stdout


def test_a_tokenizer_without_turns_is_said(tuned, tmp_path, caplog):
    """The export cannot stop where it has learnt to."""
    for path in (tuned / "tok").iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    export(open_checkpoint(tuned / "run", tokenizer=tmp_path), tmp_path / "hf", ExportOptions(quiet=True))
    assert "the tokenizer has no chat template whose turns end" in caplog.text


def test_older_files_that_name_tokens_say_the_same(tuned, tmp_path):
    """special_tokens_map.json wins over tokenizer_config.json in transformers."""
    for path in (tuned / "tok").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    export(open_checkpoint(tuned / "run", tokenizer=tmp_path), tmp_path / "hf", ExportOptions(quiet=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "<|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").pad_token == "<|endoftext|>"
    (tmp_path / "special_tokens_map.json").write_text("[1]")
    with pytest.raises(ConversionError, match=r"special_tokens_map.json: is no JSON object"):
        export(open_checkpoint(tuned / "run", tokenizer=tmp_path), tmp_path / "other", ExportOptions(quiet=True))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"temperature": "hot"}, r"generation_config.json: temperature = hot: must be a number"),
        ({"top_k": -1, "top_p": 0}, r"top_k = -1: must be 0 .*\n.*top_p = 0"),
        ([1], r"generation_config.json: is no JSON object"),
    ],
)
def test_values_that_nothing_can_be_sampled_with(said, told, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    content = said if isinstance(said, list) else {"do_sample": True, **said}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=told):
        stated_sampling(tmp_path)


def test_values_that_are_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert stated_sampling(tmp_path) == {}
    for content, values in (
        ({"do_sample": True, "temperature": None, "top_k": 20.0}, {"top_k": 20}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"temperature": 0.7}, {}),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        assert stated_sampling(tmp_path) == values


def test_quantized_releases_end_there_too(tuned, tmp_path):
    out = tmp_path / "out"
    words = ("quantize", tuned / "run", out, "--format", "fp8-block,gguf:F16")
    done = run("checkpoints_convert.convert", *words)
    assert done.returncode == 0, done.stderr
    turn = load_tokenizer(tuned / "tok").spellable["<|im_end|>"]
    (configs,) = out.rglob("tokenizer_config.json")
    assert json.loads(configs.read_text())["eos_token"] == "<|im_end|>"
    assert json.loads(configs.with_name("config.json").read_text())["eos_token_id"] == turn
    (file,) = out.rglob("*.gguf")
    assert GgufFile(file).keys["tokenizer.ggml.eos_token_id"] == turn
    done = run("checkpoints_convert.convert", "verify", tuned / "run", file)
    assert "tokenizer" not in done.stdout, done.stdout


def test_published_values_stay(tuned, tmp_path):
    """A generation_config.json that stops at the end of a turn is the releasing person's word."""
    said = {"eos_token_id": [load_tokenizer(tuned / "tok").spellable["<|im_end|>"]], "do_sample": True, "top_k": 5}
    for path in (tuned / "tok").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    export(open_checkpoint(tuned / "run", tokenizer=tmp_path), tmp_path / "hf", ExportOptions(quiet=True))
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == said
    assert stated_sampling(tmp_path / "hf") == {"top_k": 5}
