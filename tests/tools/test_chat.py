"""``mq generate --chat``: single questions, files of them, and conversations."""

import json
import signal
import subprocess
from types import SimpleNamespace

import pytest

from tests.conftest import command, environment, run
from tests.tiers import cases

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HOW = ("--temperature", 0.8, "--seed", 4, "--max-new-tokens", 12)


@pytest.fixture(scope="module")
def hf(finished_run, tmp_path_factory):
    """An export whose tokenizer has a chat template."""
    out = tmp_path_factory.mktemp("export") / "hf"
    run("checkpoints_convert.convert", "to-hf", finished_run, out, check=True)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


def written_out(*turns):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def continued(hf, prompt):
    (found,) = json.loads(run("tools.generate", hf, "--prompt", prompt, *HOW, "--json", check=True).stdout)
    return found["text"]


def test_a_question(hf, tmp_path):
    expected = continued(hf, written_out(("system", "Be brief."), ("user", "print")))
    words = ("--chat", "--system", "Be brief.", *HOW)
    (found,) = json.loads(run("tools.generate", hf, "--prompt", "print", *words, "--json", check=True).stdout)
    assert (found["prompt"], found["text"]) == ("print", expected)
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"prompt": "print"}\n')
    run("tools.generate", hf, "--prompts", asked, "--output", out, *words, check=True)
    assert json.loads(out.read_text())["text"] == expected


@pytest.mark.parametrize("layout", cases([()], [("parallel.tensor_model_parallel_size=2",)]))
def test_a_conversation(layout, hf, tmp_path):
    """From a pipe: no signs of a terminal, answers alone."""
    kept, spoilt = tmp_path / "kept.json", tmp_path / "none/kept.json"
    lines = [
        "print",
        "and",
        f"/save {kept}",
        f"/save {kept}",
        f"/save {spoilt}",
        "/unknown",
        "/system Be.",
        "print",
        "/quit",
    ]
    done = subprocess.run(
        command("tools.generate", hf, "--chat", *HOW, *layout),
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=True,
    )
    first = continued(hf, written_out(("user", "print")))
    second = continued(hf, written_out(("user", "print"), ("assistant", first), ("user", "and")))
    third = continued(hf, written_out(("system", "Be."), ("user", "print")))
    told = done.stdout
    for text in (f"{first}\n{second}\n", "exists", "cannot be written", "/reset", f"{third}\n"):
        assert text in told
        told = told[told.index(text) :]
    assert json.loads(kept.read_text())["messages"] == [
        {"role": "user", "content": "print"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": second},
    ]


def test_an_answer_that_is_interrupted(hf, tmp_path):
    """Ctrl-C ends it and not the program; another one does. The likeliest answer of this model never ends by itself."""
    words = command("tools.generate", hf, "--chat", "--temperature", 0, "--max-new-tokens", 3000)
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    process.stdin.write("print\n")
    process.stdin.flush()
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    process.stdin.write(f"/save {tmp_path / 'kept.json'}\n/quit\n")
    process.stdin.flush()
    rest = process.stdout.read()
    assert process.wait(60) == 0
    turns = json.loads((tmp_path / "kept.json").read_text())["messages"]
    assert (turns[1]["content"] + "\n").startswith(begun[:20].rstrip("\n"))
    assert len(turns[1]["content"]) < 3000
    assert turns[1]["content"] in begun + rest


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--chat", "--json"), "give --prompt"),
        (("--system", "x", "--prompt", "y"), "needs --chat"),
        (("--chat", "--prompt", "x"), "no chat template"),
        ((), "give texts with --prompt"),
    ],
)
def test_what_is_refused(words, told, finished_run):
    done = run("tools.generate", finished_run, *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_an_answer_ends_where_the_template_ends_it(hf):
    """Files of a base model name the token that ends a text alone."""
    from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
    from tools.generation.loaded import LoadedModel

    tokenizer = load_tokenizer(hf)
    model = LoadedModel(None, tokenizer, (tokenizer.end_of_text,), SimpleNamespace(tokenizer=hf), "fp32")
    assert model.chat_ends == (tokenizer.end_of_text, tokenizer.spellable["<|im_end|>"])
