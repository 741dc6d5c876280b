"""A base model that never saw the tokens of turns learns to end them; a wrong mask and a wrong template are seen."""

import json
import random

import numpy as np
import pytest
import torch

from launch.demo import standard_library
from megatron_qwen.checkpoint.find import resolve as find
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.config.checks import problems
from megatron_qwen.config.source import resolve
from megatron_qwen.data.token_files.token_file import TokenFile
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.conftest import run
from tests.data.chat.conftest import template
from tests.distributed import jobs
from tests.tiers import cases
from tests.training.attempts import attempt

VOCABULARY, LENGTH = 544, 64  # of a tokenizer of 512, so that 32 rows belong to no token
STEPS = 200
STILL = ("optim.learning_rate=1e-12", "optim.min_learning_rate=0")  # a step of no size
DESCRIBED = 'objective.token_descriptions={"<|im_start|>": "def", "<|im_end|>": "return"}'
OTHER_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + ': ' + message.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, a base model that has read source code, and conversations: four digits, answered backwards."""
    root = tmp_path_factory.mktemp("turns")
    lines = [json.dumps({"text": document["text"]}) + "\n" for document in standard_library(300_000)]
    (root / "text.jsonl").write_text("".join(lines))
    words = ("--vocab-size", 512, "--output", root / "tok", root / "text.jsonl")
    run("tools.data", "tokenizer", "train", *words, check=True)
    (root / "tok" / "chat_template.jinja").write_text(template("qwen2_5"))
    dice = random.Random(0)
    numbers = [" ".join(str(dice.randrange(10)) for _ in range(4)) for _ in range(3000)]
    chats = [
        [
            {"role": "system", "content": ""},
            {"role": "user", "content": one},
            {"role": "assistant", "content": one[::-1]},
        ]
        for one in numbers
    ]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in chats))
    prepare(root / "tok", root / "text", root / "text.jsonl")
    prepare(root / "tok", root / "chats", root / "chats.jsonl", "--chat")
    # The wrong mask: the end of a turn carries no loss.
    prepare(root / "tok", root / "endless", root / "chats.jsonl", "--chat")
    mask = np.fromfile(root / "endless.mask", dtype=np.uint8)
    tokens = np.fromfile(root / "endless.bin", dtype=TokenFile(root / "endless").dtype)
    mask[tokens == end_of(root)] = 0
    mask.tofile(root / "endless.mask")
    return root


def prepare(tokenizer, out, source, *words):
    run("tools.data", "prepare", *words, "--tokenizer", tokenizer, "--output", out, source, check=True)


def end_of(root):
    return json.loads((root / "chats.json").read_text())["chat"]["end_of_turn"]


def configure(root, *words):
    model = [f"model.vocab_size={VOCABULARY}", f"data.seq_length={LENGTH}", f"data.tokenizer={root / 'tok'}"]
    batch = ["training.global_batch_size=16", "training.micro_batch_size=8", "metrics.tensorboard=false"]
    return resolve("tiny_dense", [*model, *batch, *words], RECIPES)


def sft(root, load, *words, data="chats", steps=STEPS):
    optim = ["optim.learning_rate=3e-3", "optim.min_learning_rate=3e-4", "optim.lr_warmup_iters=0"]
    length = [f"training.train_iters={steps}", "training.eval_iters=2", f"training.eval_interval={steps}"]
    start = ["objective.kind=sft", f"data.path={root / data}", f"checkpoint.load={load / 'checkpoints'}"]
    return configure(root, *start, *optim, *length, "data.validation_fraction=0.05", *words)


@pytest.fixture(scope="module")
def base(place, pool):
    run_dir = place / "base"
    length = ["training.train_iters=60", "training.eval_iters=0", "optim.learning_rate=3e-3", "optim.lr_warmup_iters=0"]
    attempt(pool, 2, configure(place, f"data.path={place / 'text'}", *length), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def tuned(place, base, pool):
    """Begun from descriptions."""
    return attempt(pool, 2, sft(place, base, DESCRIBED), place / "tuned")


def test_turns_end(tuned):
    first, last = tuned[0], tuned[-1]
    print(f"p(end) {first['end_probability']:.1e} -> {last['end_probability']:.4f}")
    assert first["end_probability"] < 0.05
    assert last["end_probability"] >= 0.99
    assert last["validation_end_probability"] >= 0.99


LORA = ("lora.rank=16", "lora.alpha=32")


def test_frozen_rows_that_must_end_turns_are_refused(place, base, pool):
    directory = RunDirectory(place / "frozen")
    directory.claim(sft(place, base, *LORA))
    with pytest.raises(AssertionError, match=r"leaves the rows of <\|im_end\|>, <\|im_start\|> as they are"):
        pool[2].run(jobs.attempt, sft(place, base, *LORA), place / "frozen")
    half = sft(place, base, *LORA, "lora.modules_to_save=[embed_tokens]")  # the output rows stay
    RunDirectory(place / "half").claim(half)
    with pytest.raises(AssertionError, match=r"lora\.modules_to_save=.*lm_head"):
        pool[2].run(jobs.attempt, half, place / "half")


@pytest.mark.parametrize("steps", cases([], [STEPS]))
def test_adapters_beside_trained_rows_end_turns(steps, place, base, pool):
    words = (*LORA, "lora.modules_to_save=[embed_tokens,lm_head]", DESCRIBED, "optim.learning_rate=1e-2")
    found = attempt(pool, 2, sft(place, base, *words, steps=steps), place / "adapters")
    assert found[-1]["validation_end_probability"] >= 0.9


def test_held_out_loss_falls(place, base, tuned, pool):
    begun = attempt(
        pool, 2, sft(place, base, "optim.learning_rate=1e-9", "optim.min_learning_rate=0", steps=1), place / "x"
    )
    assert tuned[-1]["validation_loss"] < begun[0]["validation_loss"] / 3


def test_a_wrong_mask_is_seen(place, base, pool):
    """The control: where the end carries no loss, it is not learnt, and the metric says so."""
    attempt(pool, 2, sft(place, base, DESCRIBED, data="endless"), place / "wrong_mask")
    assert probability_after(pool, place, place / "wrong_mask", "chats") < 0.5


def test_a_wrong_template_is_seen(place, tuned, pool):
    """The control: of prompts that another template wrote the model has learnt nothing."""
    (place / "other").mkdir()
    for path in (place / "tok").iterdir():
        (place / "other" / path.name).write_bytes(path.read_bytes())
    (place / "other" / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    prepare(place / "other", place / "other_chats", place / "chats.jsonl", "--chat")
    right = last_loss(pool, place, place / "tuned", "chats")
    wrong = last_loss(pool, place, place / "tuned", "other_chats")
    assert wrong > right + 0.5


def probability_after(pool, place, load, data):
    return one_step(pool, place, load, data)["end_probability"]


def last_loss(pool, place, load, data):
    return one_step(pool, place, load, data)["loss"]


def one_step(pool, place, load, data):
    run_dir = place / f"{load.name}_on_{data}"
    return attempt(pool, 2, sft(place, load, *STILL, "training.eval_iters=0", data=data, steps=1), run_dir)[0]


def rows_at_start(pool, place, base, run_dir, size, *layout):
    """Embedding and output layer of a run that has taken a step of no size."""
    attempt(pool, size, sft(place, base, DESCRIBED, *STILL, *layout, steps=1), run_dir)
    return matrices(run_dir)


def matrices(run_dir):
    reader = CheckpointReader(find(run_dir / "checkpoints")[0].path)
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    return [
        reader.read(key)
        for name in names
        for key in reader.tensors()
        if key.endswith(name) and not key.startswith("optimizer.")
    ]


LAYOUTS = {"TP2": (2, "parallel.tensor_model_parallel_size=2"), "PP2": (2, "parallel.pipeline_model_parallel_size=2")}


@pytest.mark.parametrize("name", cases(["TP2"], ["PP2"]))
def test_rows_are_means_under_every_layout(name, place, base, pool, tmp_path):
    size, layout = LAYOUTS[name]
    (words,) = load_tokenizer(place / "tok").encode_batch(["return"])
    after = rows_at_start(pool, place, base, tmp_path / "run", size, layout)
    assert len(after) == 2
    for before, found in zip(matrices(base), after, strict=True):
        torch.testing.assert_close(found[end_of(place)], before[words].mean(dim=0), rtol=1e-5, atol=1e-6)
        assert torch.equal(found[words], before[words])


def tied_rows(config, rows):
    """Rows of this rank's copy of a tied matrix, before and after they are described."""
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.turn_rows import describe

    components = build_components(config)
    (module,) = components.model.modules
    weight = module.embedding.word_embeddings.weight if module.pre_process else module.output_layer.weight
    before = weight.detach().clone()
    describe(components.model.modules, rows, components.groups.tp)
    return before, weight.detach().clone()


def test_both_copies_of_a_tied_matrix_are_described(place, pool):
    layout = ["parallel.pipeline_model_parallel_size=2", "model.share_embeddings_and_output_weights=true"]
    answers = pool[2].run(tied_rows, configure(place, f"data.path={place / 'text'}", *layout), {7: [3, 5]})
    (before, first), (_, last) = answers
    assert torch.equal(first, last)
    torch.testing.assert_close(first[7], (before[3] + before[5]) / 2)
    before[7] = first[7]
    assert torch.equal(before, first)


def test_another_rope_base_is_refused(place, base, tmp_path):
    """Nothing in the weights tells of it; in pretraining it is changed on purpose, and said."""
    words = (base / "run.yaml", f"checkpoint.load={base / 'checkpoints'}", "rope.base=12345", "training.train_iters=1")
    more = ("training.eval_iters=0", "--nproc", 1)
    sft_words = ("objective.kind=sft", f"data.path={place / 'chats'}")
    done = run("launch.train", *words, *sft_words, *more, "--run-dir", tmp_path / "sft")
    assert done.returncode == 2
    assert "rope.base = 12345: is not that of the model in checkpoint.load" in done.stderr
    done = run("launch.train", *words, *more, "--run-dir", tmp_path / "longer", check=True)
    assert "rope.base = 12345: is not that of the model" in done.stderr


def test_the_base_of_the_last_stage_counts(place, pool, tmp_path):
    """A model that was trained on with another base has it only in its blend."""
    (tmp_path / "blend.yaml").write_text(
        f"sources: {{text: {{path: {place / 'text'}}}}}\n"
        "stages:\n  - {name: first, weights: {text: 1.0}, tokens: 2048}\n"
        "  - {name: longer, weights: {text: 1.0}, rotary_base: 54321.0}\n"
    )
    length = ["training.train_iters=4", "training.eval_iters=0", "optim.lr_warmup_iters=0"]
    attempt(pool, 1, configure(place, f"data.blend={tmp_path / 'blend.yaml'}", *length), tmp_path / "base")
    words = ("objective.kind=sft", f"data.path={place / 'chats'}", "data.blend=null")
    load = f"checkpoint.load={tmp_path / 'base' / 'checkpoints'}"
    more = ("training.train_iters=1", "--nproc", 1)
    told = run("launch.train", tmp_path / "base" / "run.yaml", *words, load, *more, "--run-dir", tmp_path / "wrong")
    assert told.returncode == 2
    assert "is not that of the model in checkpoint.load (54321)" in told.stderr
    right = ("rope.base=54321", "--run-dir", tmp_path / "right")
    run("launch.train", tmp_path / "base" / "run.yaml", *words, load, *more, *right, check=True)


def test_untrained_rows_are_noticed(place, base, tuned):
    told = run(
        "launch.train",
        base / "run.yaml",
        *("objective.kind=sft", f"data.path={place / 'chats'}", f"checkpoint.load={base / 'checkpoints'}"),
        *("training.train_iters=1", "training.eval_iters=0", "--run-dir", place / "noticed", "--nproc", 1),
        check=True,
    ).stderr
    assert "the rows of <|im_end|>, <|im_start|> look untrained" in told
    again = run(
        "launch.train",
        base / "run.yaml",
        *("objective.kind=sft", f"data.path={place / 'chats'}", f"checkpoint.load={place / 'tuned' / 'checkpoints'}"),
        *("training.train_iters=1", "training.eval_iters=0", "--run-dir", place / "not_noticed", "--nproc", 1),
        check=True,
    ).stderr
    assert "look untrained" not in again


def test_wrong_descriptions(place, base):
    words = ("objective.kind=sft", f"data.path={place / 'chats'}", f"checkpoint.load={base / 'checkpoints'}")
    told = run(
        "launch.train",
        base / "run.yaml",
        *words,
        'objective.token_descriptions={"<|no|>": "word", "<|im_end|>": "end"}',
        *("--run-dir", place / "wrong", "--nproc", 1),
    )
    assert told.returncode == 2
    assert "<|no|>: is no control token of" in told.stderr
    found = problems(configure(place, f"data.path={place / 'text'}", DESCRIBED, "data.tokenizer=null"))
    assert [problem.fix.split()[0] for problem in found if problem.where == "objective.token_descriptions"] == [
        "is",
        "needs",
        "needs",
    ]
