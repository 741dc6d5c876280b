"""``mq serve`` through OpenAI's own client: streams, tools, limits, bad requests, and an end that loses nothing."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest

from tests.conftest import command, environment, run
from tests.tiers import cases, count

TEMPLATE = (
    "{% if tools %}tools:{% for tool in tools %}{{ tool.function.name }}{% endfor %}\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def hf(finished_run, tmp_path_factory):
    """An export whose tokenizer has a chat template."""
    out = tmp_path_factory.mktemp("export") / "hf"
    run("checkpoints_convert.convert", "to-hf", finished_run, out, check=True)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


class Running:
    """A server as a process."""

    def __init__(self, source, *words, key=None):
        env = {**environment(), **({"MQ_SERVE_KEY": key} if key else {})}
        words = command("tools.serve", source, "--port", 0, "--name", "tiny", *words)
        self.process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.url = re.search(r"http://\S+/v1", line)[0]
        self.client = openai.OpenAI(base_url=self.url, api_key=key or "none", max_retries=0)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out + err

    def raw(self, path, body=None, headers=None):
        """Status and text of a request that no client would make."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url.removesuffix("/v1") + path, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def server(hf):
    found = Running(hf, "--max-pending", 300)
    yield found
    code, told = found.stop()
    assert code == 0, told
    assert "Traceback" not in told


def offline(hf, prompts, *words):
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = run("tools.generate", hf, *asked, "--json", "--logprobs", *words, check=True)
    return json.loads(done.stdout)


def test_completions_are_those_of_generate(server, hf):
    prompts = ["def f(x):", "import os"]
    words = ("--temperature", 0.8, "--top-p", 0.9, "--seed", 5, "--max-new-tokens", 12, "--samples", 2)
    expected = offline(hf, prompts, *words)
    found = server.client.completions.create(
        model="tiny", prompt=prompts, temperature=0.8, top_p=0.9, seed=5, max_tokens=12, n=2, logprobs=1
    )
    assert [choice.text for choice in found.choices] == [one["text"] for one in expected]
    assert [choice.logprobs.token_logprobs for choice in found.choices] == [one["logprobs"] for one in expected]
    assert [choice.finish_reason for choice in found.choices] == [one["finish_reason"] for one in expected]
    assert found.usage.completion_tokens == sum(len(one["tokens"]) for one in expected)
    ids = server.client.completions.create(model="tiny", prompt=[5, 6, 7], temperature=0, max_tokens=3)
    assert ids.usage.prompt_tokens == 3


def test_a_chat_is_streamed(server, hf):
    """The pieces together are the text of the whole answer, and that of the prompt written out."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "print"}]
    how = {"model": "tiny", "messages": turns, "temperature": 0.9, "seed": 11, "max_tokens": 20}
    whole = server.client.chat.completions.create(**how)
    pieces, usage, reason = [], None, None
    for chunk in server.client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    assert (usage.completion_tokens, reason) == (whole.usage.completion_tokens, whole.choices[0].finish_reason)
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nprint<|im_end|>\n<|im_start|>assistant\n"
    (expected,) = offline(hf, [prompt], "--temperature", 0.9, "--top-p", 1, "--seed", 11, "--max-new-tokens", 20)
    assert whole.choices[0].message.content == expected["text"]
    with_tools = server.client.chat.completions.create(**how, tools=[TOOL])
    assert with_tools.usage.prompt_tokens > whole.usage.prompt_tokens


def test_stop_texts_never_show(server):
    how = {"model": "tiny", "prompt": "def f(x):", "temperature": 1, "seed": 3, "max_tokens": 60}
    text = server.client.completions.create(**how).choices[0].text
    stop = text[8:11]
    expected = text[: text.index(stop)]
    whole = server.client.completions.create(**how, stop=[stop]).choices[0]
    assert (whole.text, whole.finish_reason) == (expected, "stop")
    pieces = [chunk.choices[0].text for chunk in server.client.completions.create(**how, stop=stop, stream=True)]
    assert "".join(pieces) == expected


def test_many_at_once_are_answered_as_alone(server, hf):
    number = count(quick=40, thorough=200)
    prompts = [f"x = {index}" for index in range(number)]
    expected = offline(hf, prompts, "--temperature", 0.7, "--top-p", 1, "--seed", 2, "--max-new-tokens", 8)

    def ask(prompt):
        how = {"model": "tiny", "temperature": 0.7, "seed": 2, "max_tokens": 8}
        return server.client.completions.create(prompt=prompt, **how).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        found = list(pool.map(ask, prompts))
    assert found == [one["text"] for one in expected]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "body"),
        ({"prompt": "x"}, 400, "model"),
        ({"model": "other", "prompt": "x"}, 404, "does not exist"),
        ({"model": "tiny", "prompt": "x", "temperature": -1, "n": 0}, 400, "temperature"),
        ({"model": "tiny", "prompt": "x", "logit_bias": {"1": 5}}, 400, "logit_bias"),
        ({"model": "tiny", "prompt": "x", "banana": 1}, 400, "banana"),
        ({"model": "tiny", "prompt": ""}, 400, "no tokens"),
        ({"model": "tiny", "prompt": [999_999]}, 400, "none of the"),
        ({"model": "tiny", "prompt": "x", "max_tokens": 10_000_000}, 400, "positions"),
        ({"model": "tiny", "prompt": "x" * 9_000_000}, 413, "bytes"),
    ],
)
def test_what_is_refused(server, body, status, told):
    found, text = server.raw("/v1/completions", body, {"Content-Type": "application/json"})
    assert (found, told in json.loads(text)["error"]["message"]) == (status, True), text
    assert server.raw("/health")[0] == 200


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user"}],
        [{"role": "user", "content": "x", "tool_calls": [{}]}],
    ],
)
def test_messages_that_are_refused(server, messages):
    with pytest.raises(openai.BadRequestError, match="messages"):
        server.client.chat.completions.create(model="tiny", messages=messages)


def test_other_paths(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.raw("/v1/nothing")[0] == 404
    assert server.raw("/v1/completions")[0] == 405
    status, text = server.raw("/metrics")
    assert status == 200
    assert float(re.search(r"^mq_serve_tokens_total (\S+)", text, re.MULTILINE)[1]) > 0


def test_a_client_that_leaves_and_one_that_reads_slowly(server):
    """What nobody waits for is given up, and does not stay in the cache."""
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 3000, "temperature": 1, "stream": True}).encode()
    host, port = re.search(r"//(.+):(\d+)/", server.url).groups()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    gone, slow = (socket.create_connection((host, int(port))) for _ in range(2))
    for one in (gone, slow):
        one.sendall(head.encode() + body)
    assert gone.recv(100)
    gone.close()
    assert server.client.completions.create(model="tiny", prompt="y", max_tokens=4).choices
    deadline = time.monotonic() + 60
    while number(server, "pending") > 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    slow.close()
    while number(server, "pending") or number(server, "cache_free_ratio") < 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def number(server, name):
    return float(re.search(rf"^mq_serve_{name} (\S+)", server.raw("/metrics")[1], re.MULTILINE)[1])


@pytest.mark.parametrize(
    "words", cases([("parallel.tensor_model_parallel_size=2",)], [("parallel.pipeline_model_parallel_size=2",)])
)
def test_a_full_queue_a_wrong_key_and_the_end(words, hf):
    """Two ranks; SIGTERM lets what was asked be answered, and refuses what comes then."""
    server = Running(hf, "--max-pending", 3, "--timeout", 120, *words, key="secret")
    how = {"model": "tiny", "prompt": "def ", "temperature": 0}
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").completions.create(**how)
    assert server.raw("/health")[0] == 200
    with pytest.raises(openai.RateLimitError):
        server.client.completions.create(**how, n=4)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.client.completions.create, **how, max_tokens=150) for _ in range(2)]
        deadline = time.monotonic() + 60
        while number(server, "running") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        code, told = server.stop()
        assert code == 0, told
        (expected,) = offline(hf, ["def "], "--temperature", 0, "--max-new-tokens", 150)
        assert [one.result().choices[0].text for one in asked] == [expected["text"]] * 2


def test_what_cannot_be_served(hf, server):
    port = re.search(r":(\d+)/", server.url)[1]
    done = run("tools.serve", hf, "--port", port)
    assert done.returncode == 2
    assert "cannot be served" in done.stderr
    assert "Traceback" not in done.stderr
    assert "MQ_SERVE_KEY" not in os.environ
    done = run("tools.serve", hf, "--host", "0.0.0.0", "--port", 70_000, "--max-pending", 0)
    assert done.returncode == 2
    assert all(told in done.stderr for told in ("--host", "--port", "--max-pending"))
