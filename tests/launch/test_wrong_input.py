"""Whatever is wrong is said at once: exit code, field or file, value, way out; no traceback, nothing lost."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import run

DENSE, MOE = "tiny_dense", "tiny_moe"

# (recipe, overrides, ranks, what the message must name)
WRONG: list[tuple[str, list[str], int, list[str]]] = [
    ("qwen2_5_8b", [], 1, ["qwen2_5_8b", "Did you mean qwen2_5_"]),
    ("nowhere/run.yaml", [], 1, ["nowhere/run.yaml", "No such file"]),
    (DENSE, ["model.num_layer=4"], 1, ["model.num_layer", "Did you mean model.num_layers?"]),
    (DENSE, ["modle.num_layers=4"], 1, ["modle.num_layers", "Did you mean model.num_layers?"]),
    (DENSE, ["training.micro_batchsize=2"], 1, ["Did you mean training.micro_batch_size?"]),
    (DENSE, ["tensor_model_parallel_size=2"], 1, ["Did you mean parallel.tensor_model_parallel_size?"]),
    (DENSE, ["model.num_layers=four"], 1, ["model.num_layers", "'four'", "int"]),
    (DENSE, ["model.num_layers=3.5"], 1, ["model.num_layers", "3.5", "int"]),
    (DENSE, ["model.num_layers=true"], 1, ["model.num_layers", "True", "int"]),
    (DENSE, ["model.num_layers="], 1, ["model.num_layers", "''", "int"]),
    (DENSE, ["model.num_layers=0"], 1, ["model.num_layers = 0", "at least 1"]),
    (DENSE, ["optim.learning_rate=-1e-3"], 1, ["optim.learning_rate = -0.001", "greater than 0"]),
    (DENSE, ["optim.learning_rate=.nan"], 1, ["optim.learning_rate = nan", "finite"]),
    (DENSE, ["optim.learning_rate=fast"], 1, ["optim.learning_rate", "'fast'", "float"]),
    (DENSE, ["optim.min_learning_rate=1"], 1, ["optim.min_learning_rate = 1", "exceeds optim.learning_rate"]),
    (
        DENSE,
        ["optim.lr_warmup_iters=10"],
        1,
        ["optim.lr_warmup_iters = 10", "below the end of the decay, iteration 10"],
    ),
    (DENSE, ["optim.lr_decay_style=cosin"], 1, ["'cosin'", "cosine, wsd, linear, constant"]),
    (DENSE, ["precision.dtype=fp16"], 1, ["precision.dtype", "'fp16'", "bf16, fp32"]),
    (DENSE, ["precision.fp8=delayed"], 1, ["precision.fp8 = delayed", "precision.dtype=bf16"]),
    (DENSE, ["precision.fp8=tensorwise", "precision.backend=torch"], 1, ["requires Transformer Engine on a GPU"]),
    (DENSE, ["precision.emulate_fp8=true"], 1, ["precision.emulate_fp8", "tensorwise or blockwise"]),
    (
        DENSE,
        ["precision.emulate_fp8=true", "precision.fp8=blockwise", "precision.backend=te"],
        1,
        ["precision.emulate_fp8", "torch or auto"],
    ),
    (
        DENSE,
        ["precision.emulate_fp8=true", "precision.fp8=tensorwise", "precision.num_layers_at_start_in_bf16=99"],
        1,
        ["precision.num_layers_at_start_in_bf16", "at most the 4 layers"],
    ),
    (DENSE, ["precision.exp_avg_dtype=bf16"], 1, ["precision.exp_avg_dtype", "use_precision_aware_optimizer=true"]),
    (DENSE, ["precision.use_precision_aware_optimizer=true"], 1, ["use_precision_aware_optimizer", "bf16"]),
    (DENSE, ["model.num_attention_heads=5"], 1, ["model.hidden_size = 64", "5"]),
    (DENSE, ["model.num_query_groups=3"], 1, ["model.num_attention_heads = 4", "3"]),
    (DENSE, ["model.kv_channels=15"], 1, ["model.kv_channels = 15", "even"]),
    (DENSE, ["rope.scaling=4"], 1, ["rope.scaling = 4.0", "must be 1 with rope.kind=default"]),
    (DENSE, ["rope.kind=yarn"], 1, ["rope.kind", "'yarn'", "one of default"]),
    (DENSE, ["model.rotary_base=1e4", "rope.base=1e6"], 1, ["model.rotary_base = 10000.0", "moved to rope.base"]),
    (DENSE, ["data.seq_length=512"], 1, ["data.seq_length = 512", "max_position_embeddings = 256"]),
    (DENSE, ["parallel.tensor_model_parallel_size=4"], 4, ["KV heads", "use one of 1, 2"]),
    (DENSE, ["parallel.sequence_parallel=true"], 1, ["parallel.sequence_parallel", "tensor_model_parallel_size > 1"]),
    (DENSE, ["parallel.tensor_model_parallel_size=2"], 3, ["ranks = 3", "TP x PP x CP = 2"]),
    (DENSE, ["parallel.pipeline_model_parallel_size=3"], 3, ["4 layers on 3 pipeline ranks", "do not split evenly"]),
    (
        DENSE,
        ["parallel.virtual_pipeline_model_parallel_size=2"],
        1,
        ["requires parallel.pipeline_model_parallel_size > 1"],
    ),
    (
        DENSE,
        [
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "parallel.overlap_p2p_comm=false",
        ],
        2,
        ["parallel.overlap_p2p_comm", "wrong gradients"],
    ),
    (
        DENSE,
        ["parallel.context_parallel_size=2", "data.seq_length=62"],
        2,
        ["data.seq_length = 62", "divisible by 2 x context_parallel_size = 4; use 60 or 64"],
    ),
    (DENSE, ["parallel.expert_model_parallel_size=2"], 2, ["parallel.expert_model_parallel_size = 2", "no experts"]),
    (DENSE, ["parallel.use_distributed_optimizer=false"], 1, ["parallel.use_distributed_optimizer", "must be true"]),
    (DENSE, ["parallel.overlap_param_gather=true"], 1, ["requires parallel.overlap_grad_reduce=true"]),
    (
        DENSE,
        ["training.global_batch_size=3"],
        2,
        ["training.global_batch_size = 3", "= 2 (micro-batch 1, data parallel 2); use 2 or 4."],
    ),
    (DENSE, ["training.rampup_batch_size=[2, 3, 8]"], 1, ["training.rampup_batch_size", "4 - 2 must be divisible"]),
    (
        DENSE,
        ["training.recompute_granularity=selective", "training.recompute_modules=[moe]"],
        1,
        ["moe", "does not exist"],
    ),
    (DENSE, ["checkpoint.keep_last=0"], 1, ["checkpoint.keep_last = 0", "at least 1"]),
    (DENSE, ["parallel.tensor_model_parallel_size=0"], 1, ["parallel.tensor_model_parallel_size = 0", "at least 1"]),
    (DENSE, ["model.num_attention_heads=0"], 1, ["model.num_attention_heads = 0", "at least 1"]),
    (DENSE, ["training.train_iters=1:30"], 1, ["training.train_iters", "'1:30'", "int"]),
    (DENSE, ["optim.learning_rate=1" + 400 * "0"], 1, ["optim.learning_rate"]),
    (DENSE, ["data.path="], 1, ["data.path = ''"]),
    (DENSE, ["=5"], 1, ["=5", "section.field=value"]),
    (DENSE, ["justaword"], 1, ["justaword", "section.field=value"]),
    (MOE, ["parallel.tensor_model_parallel_size=2"], 2, ["parallel.sequence_parallel", "mixture-of-experts"]),
    (
        MOE,
        ["parallel.expert_model_parallel_size=3"],
        3,
        ["parallel.expert_model_parallel_size = 3", "num_moe_experts = 4"],
    ),
    (MOE, ["model.moe_router_topk=5"], 1, ["model.moe_router_topk = 5", "at most model.num_moe_experts = 4"]),
    (MOE, ["model.moe_ffn_hidden_size=null"], 1, ["model.moe_ffn_hidden_size", "must be set"]),
    (
        MOE,
        ["model.moe_shared_expert_intermediate_size=null"],
        1,
        ["model.moe_shared_expert_gate", "requires a shared expert"],
    ),
]


def test_there_are_forty():
    assert len(WRONG) >= 40


@pytest.mark.parametrize(("recipe", "overrides", "ranks", "named"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_configuration(recipe, overrides, ranks, named, tmp_path):
    run_dir = tmp_path / "run"
    done = run("launch.train", recipe, *overrides, "--run-dir", run_dir, "--nproc", ranks)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("configuration error")
    assert "Traceback" not in done.stderr
    for text in named:
        assert text in done.stderr, done.stderr
    assert not run_dir.exists()


def test_all_problems_at_once(tmp_path):
    wrong = ["model.nonsense=1", "optim.learning_rate=fast", "training.train_iters=0.5"]
    done = run("launch.train", DENSE, *wrong, "--run-dir", tmp_path / "run")
    assert "3 problems" in done.stderr
    mixed = ["model.num_layer=3", "parallel.pipeline_model_parallel_size=3"]
    done = run("launch.train", DENSE, *mixed, "--run-dir", tmp_path / "run")
    assert "model.num_layer:" in done.stderr
    assert "4 layers on 3 pipeline ranks" in done.stderr
    illegal = ["model.num_query_groups=3", "data.seq_length=512", "optim.lr_warmup_iters=10"]
    done = run("launch.train", DENSE, *illegal, "--run-dir", tmp_path / "run")
    assert "3 problems" in done.stderr


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("recipe: tiny_dense\nmodel:\n  num_layers: 2\n  num_layers: 4\n", ["run.yaml:3", "duplicate key"]),
        ("recipe: tiny_dense\nmodel: [1\n", ["run.yaml", "not valid YAML"]),
        ("- a\n- b\n", ["run.yaml", "must contain a YAML mapping"]),
        ("recipe: tiny_dense\nmodels:\n  num_layers: 2\n", ["models", "Did you mean model?"]),
        ("recipe: tiny_dens\n", ["tiny_dens", "Did you mean tiny_dense?"]),
        ("model:\n  num_layers: 2\n", ["model.hidden_size", "model.vocab_size", "must be set in"]),
        ("recipe: tiny_dense\nmodel: 5\n", ["model = 5", "mapping of fields"]),
    ],
)
def test_wrong_yaml(text, named, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    done = run("launch.train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in named:
        assert word in done.stderr, done.stderr


def test_binary_yaml(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    done = run("launch.train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "not UTF-8" in done.stderr


def train_tiny(tokens: object, *overrides: str, run_dir: Path):
    return run("launch.train", DENSE, f"data.path={tokens}", *overrides, "--run-dir", run_dir)


def assert_data_error(done, *named: str) -> None:
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    for text in named:
        assert text in done.stderr, done.stderr


def test_missing_and_damaged_tokens(tokens, tmp_path):
    assert_data_error(run("launch.train", DENSE, "--run-dir", tmp_path / "run"), "data.path", "mq data prepare")
    assert_data_error(train_tiny(tmp_path / "none", run_dir=tmp_path / "run"), "none.idx", "no such token file")
    for ending in (".bin", ".idx"):
        for name in (".bin", ".idx"):
            shutil.copyfile(f"{tokens}{name}", tmp_path / f"cut{name}")
        cut = tmp_path / f"cut{ending}"
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        assert_data_error(train_tiny(tmp_path / "cut", run_dir=tmp_path / "run"), f"cut{ending}", "is cut off")
    (tmp_path / "cut.idx").write_bytes(b"something else entirely, long enough for a header")
    assert_data_error(train_tiny(tmp_path / "cut", run_dir=tmp_path / "run"), "cut.idx", "not a Megatron index")
    assert not (tmp_path / "run").exists()


def test_tokenizer_that_does_not_match_the_data(tokens, corpus, tmp_path):
    made = run("tools.data", "tokenizer", "train", "--vocab-size", 300, "--output", tmp_path / "other", corpus)
    assert made.returncode == 0, made.stderr
    done = train_tiny(tokens, f"data.tokenizer={tmp_path / 'other'}", run_dir=tmp_path / "run")
    assert_data_error(done, "data.tokenizer", "is not the tokenizer", "prepare the data again")
    small = train_tiny(tokens, "model.vocab_size=310", run_dir=tmp_path / "run")
    assert_data_error(small, "model.vocab_size = 310", "320 ids")
    none = train_tiny(tokens, f"data.tokenizer={tmp_path / 'nowhere'}", run_dir=tmp_path / "run")
    assert_data_error(none, "nowhere", "tokenizer.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.txt", b"", ["empty.txt", "is empty"]),
        ("blank.jsonl", b'{"text": ""}\n\n', ["no text"]),
        ("latin.txt", "café".encode("latin-1"), ["latin.txt", "not UTF-8"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', ["broken.jsonl:2", "not JSON"]),
        ("other.jsonl", b'{"body": "a"}\n', ["other.jsonl:1", "'text'", "--field"]),
        ("number.jsonl", b'{"text": 5}\n', ["number.jsonl:1"]),
        ("half.jsonl", b'{"text": "a\\ud800b"}\n', ["half.jsonl:1", "surrogate"]),
        ("deep.jsonl", b"[" * 100_000 + b"\n", ["deep.jsonl:1", "not JSON"]),
        ("page.pdf", b"%PDF", ["page.pdf", ".jsonl, .ndjson, .json, .txt, .parquet"]),
    ],
)
def test_unreadable_or_empty_text(name, content, named, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    prefix = tmp_path / "out" / "tokens"
    for arguments in (
        ["prepare", "--tokenizer", tokenizer, "--output", prefix],
        ["tokenizer", "train", "--vocab-size", 300, "--output", tmp_path / "tok"],
    ):
        assert_data_error(run("tools.data", *arguments, tmp_path / name), *named)
    assert not list(tmp_path.glob("out/*"))
    assert not (tmp_path / "tok" / "tokenizer.json").exists()


def test_text_that_is_not_there(tokenizer, tmp_path):
    missing = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    done = run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "tokens", *missing)
    assert_data_error(done, "2 problems", "a.txt", "b.jsonl")


def test_a_failed_preparation_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "fine"}) + "\nnot json\n")
    done = run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "out", tmp_path / "bad.jsonl")
    assert_data_error(done, "bad.jsonl:2")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_run_directory_of_another_configuration(finished_run, tokens, tokenizer, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    changed = ["model.num_layers=2", "optim.learning_rate=5e-4", f"data.tokenizer={tokenizer}"]
    done = train_tiny(tokens, *changed, run_dir=tmp_path / "run")
    assert done.returncode == 2
    named = ("model.num_layers = 2", "differs from 4", "optim.learning_rate = 0.0005")
    for text in ("2 problems", *named, "use a new --run-dir"):
        assert text in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_the_same_data_may_lie_elsewhere(tokens, tmp_path):
    first = train_tiny(tokens, "training.train_iters=3", run_dir=tmp_path / "run")
    assert first.returncode == 0, first.stderr
    for ending in (".bin", ".idx", ".json"):
        shutil.copyfile(f"{tokens}{ending}", tmp_path / f"moved{ending}")
    again = train_tiny(tmp_path / "moved", "training.train_iters=4", run_dir=tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stderr
    assert "epochs" in (tmp_path / "run" / "logs" / "attempt_002" / "rank_0.log").read_text()
    noted = json.loads((tmp_path / "moved.json").read_text())
    (tmp_path / "moved.json").write_text(json.dumps({**noted, "bin_xxh3_128": "0" * 32}))
    refused = train_tiny(tmp_path / "moved", "training.train_iters=5", run_dir=tmp_path / "run")
    assert refused.returncode == 2
    assert "holds other tokens than those this run started with" in refused.stderr


def test_run_directory_that_holds_something_else(tokens, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = train_tiny(tokens, run_dir=tmp_path)
    assert done.returncode == 2
    assert "is not empty and has no run.yaml" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_backend_that_cannot_run_here(tokens, tmp_path):
    done = train_tiny(tokens, "precision.backend=te", run_dir=tmp_path / "te")
    assert done.returncode == 2
    assert "precision.backend = te: cannot run here: there is no CUDA device" in done.stderr
    done = train_tiny(tokens, "precision.dtype=bf16", "precision.fp8=delayed", run_dir=tmp_path / "fp8")
    assert done.returncode == 2
    assert "precision.fp8 = delayed: cannot run here: there is no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_but_damaged_checkpoints(finished_run, tokens, tokenizer, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("iter_*/run.yaml"):
        path.write_text("")
    files = [f"data.tokenizer={tokenizer}", "training.train_iters=9"]
    done = train_tiny(tokens, *files, run_dir=tmp_path / "run")
    assert done.returncode == 4, done.stderr
    assert "none of its checkpoints is valid" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "run" / "checkpoints").glob("iter_*"))) == 2
