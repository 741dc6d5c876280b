"""Published chat templates, and tokenizers that have their control tokens."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

_FAMILIES = {
    "qwen2_5": (),
    "qwen3": ("<think>", "</think>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}


def template(name: str) -> str:
    """A template that TRL has, as its model was published with it."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / f"chat_templates/{name}.jinja").read_text()


@pytest.fixture(scope="session")
def chat_tokenizer(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Called with the name of a template, gives the directory of a tokenizer that has it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            directory = made[name] = tmp_path_factory.mktemp(name)
            shutil.copytree(qwen, directory, dirs_exist_ok=True)
            library = Tokenizer.from_file(str(directory / "tokenizer.json"))
            # Qwen3's tokens of thinking are the only ones that its file does not call special, as here.
            thinks = name == "qwen3"
            library.add_tokens([AddedToken(token, special=not thinks, normalized=False) for token in _FAMILIES[name]])
            library.save(str(directory / "tokenizer.json"))
            (directory / "chat_template.jinja").write_text(template(name))
            if name in ("llama3", "gemma"):
                (directory / "tokenizer_config.json").write_text(f'{{"bos_token": "{_FAMILIES[name][0]}"}}')
        return made[name]

    return make


@pytest.fixture(scope="session")
def oracle(chat_tokenizer: Callable[[str], Path]) -> Callable[[str], PreTrainedTokenizerFast]:
    """The same tokenizer in transformers."""

    def make(name: str) -> PreTrainedTokenizerFast:
        directory = chat_tokenizer(name)
        named = json.loads((directory / "tokenizer_config.json").read_text())
        named = {key: value for key, value in named.items() if key in ("bos_token", "eos_token", "pad_token")}
        found = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **named)
        found.chat_template = template(name)
        return found

    return make
