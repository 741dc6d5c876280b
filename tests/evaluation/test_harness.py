"""Tasks through the engine against the harness's own ``hf`` model on the export of the same checkpoint."""

import json
import math

import pytest

from tests.conftest import make_run, run
from tests.evaluation.tasks import ANSWER, CHOICE, TEXT, write_tasks
from tests.tiers import cases, count

ITEMS = count(quick=12, thorough=300)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
GOLD = ("gold_logprob,none", "gold_bits_per_byte,none", "gold_probability,none")
CONTEXT = 192  # some texts are longer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks", items=ITEMS)


@pytest.fixture(scope="module")
def model(pool, tokens, tokenizer, tmp_path_factory):
    """A run and its export, by recipe."""
    made = {}

    def of(recipe):
        if recipe not in made:
            root = tmp_path_factory.mktemp(recipe)
            make_run(pool, recipe, tokens, tokenizer, root / "run")
            run("checkpoints_convert.convert", "to-hf", root / "run", root / "hf", check=True)
            made[recipe] = root / "run", root / "hf"
        return made[recipe]

    return of


@pytest.fixture(scope="module")
def theirs(model, folder):
    """Samples of the harness's own model, by recipe."""
    made = {}

    def of(recipe):
        if recipe not in made:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager

            adapter = HFLM(
                pretrained=str(model(recipe)[1]), dtype="float32", device="cpu", batch_size=8, max_length=CONTEXT
            )
            # lm-eval 0.4.13 notes 256 here, which transformers 5 then prefers to the length that a task asks for.
            adapter.model.generation_config.max_new_tokens = None
            made[recipe] = simple_evaluate(
                model=adapter,
                tasks=[CHOICE, ANSWER, TEXT],
                task_manager=TaskManager(include_path=str(folder), include_defaults=False),
                bootstrap_iters=0,
            )
        return made[recipe]

    return of


@pytest.fixture(scope="module", autouse=True)
def _offline():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**OFFLINE, "TQDM_DISABLE": "1"}.items():
            patch.setenv(name, value)
        yield


def scored(source, folder, output, *words):
    command = ("--tasks", f"{CHOICE},{ANSWER},{TEXT}", "--task-dir", folder, "--context", CONTEXT, "--output", output)
    run("tools.eval", source, *command, *words, check=True)
    found = json.loads((output / "results.json").read_text())
    lines = {task: (output / "samples" / f"{task}.jsonl").read_text().splitlines() for task in found["results"]}
    return found, {task: [json.loads(line) for line in some] for task, some in lines.items()}


@pytest.mark.parametrize(
    ("recipe", "layout"),
    cases(
        [("tiny_dense", ("parallel.tensor_model_parallel_size=2",))],
        [
            ("tiny_dense", ()),
            ("tiny_dense", ("parallel.pipeline_model_parallel_size=2",)),
            ("tiny_dense", ("--replicas", 2)),
            ("tiny_moe", ("parallel.expert_model_parallel_size=2",)),
        ],
    ),
)
def test_every_answer_is_that_of_the_harness_own_model(recipe, layout, model, theirs, folder, tmp_path):
    found, samples = scored(model(recipe)[0], folder, tmp_path / "scores", *layout)
    expected = theirs(recipe)
    for task in (CHOICE, ANSWER, TEXT):
        assert len(samples[task]) == len(expected["samples"][task]) == ITEMS
        for ours, other in zip(samples[task], expected["samples"][task], strict=True):
            assert ours["prompt_hash"] == other["prompt_hash"]
            for one, two in zip(ours["resps"], other["resps"], strict=True):
                if task == ANSWER:
                    assert one[0] == two[0]
                elif task == CHOICE:
                    assert one[0][0] == pytest.approx(two[0][0], abs=1e-4)
                    assert one[0][1] == two[0][1]
                else:
                    # Theirs is a sum in fp32, which has steps of 1e-4 at the likelihood of a whole text.
                    assert one[0] == pytest.approx(two[0], abs=1e-4, rel=2e-7)
        for name, value in expected["results"][task].items():
            if isinstance(value, float) and "stderr" not in name:
                assert math.isclose(found["results"][task][name], value, rel_tol=1e-6), name
    low, high = found["mq"]["intervals"][CHOICE]["acc,none"]
    assert low <= found["results"][CHOICE]["acc,none"] <= high
    assert {"acc,none", "acc_norm,none", *GOLD} == set(found["mq"]["intervals"][CHOICE])
    assert {"word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"} == set(found["mq"]["intervals"][TEXT])
    assert not (tmp_path / "scores/answered.jsonl").exists()
