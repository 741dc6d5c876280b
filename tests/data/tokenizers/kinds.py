"""Small tokenizers of the kinds that published models have, and texts of all scripts to compare them on."""

import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from launch.demo import standard_library

END = "<|endoftext|>"
# Of Llama 3's tokenizer.json: digits in groups of up to three.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def training_texts() -> list[str]:
    return [document["text"][:4000] for document in standard_library(200_000)]


def texts_of_all_scripts(count: int) -> list[str]:
    """Letters of every script, digits, code, blanks and line ends, each as the family's data would have it."""
    chance = random.Random(0)
    scripts: dict[str, list[str]] = {}
    for code in range(0x20, 0x1F000):
        character = chr(code)
        if character == "\u2581":  # SentencePiece's own sign for a blank
            continue
        if unicodedata.category(character)[0] in "LNPSM" and unicodedata.is_normalized("NFC", character):
            scripts.setdefault(unicodedata.name(character, "?").split()[0], []).append(character)
    names = sorted(name for name, characters in scripts.items() if len(characters) >= 8)
    blanks = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "    ", "1", "12", "2024", "3.14", "x_1", "it's", "->", "()"]
    found = [document["text"][:300] for document in standard_library(100_000)][: count // 10]
    while len(found) < count:
        letters = scripts[names[len(found) % len(names)]]
        words = ["".join(chance.choices(letters, k=chance.randint(1, 8))) for _ in range(8)]
        text = "".join(word + chance.choice(blanks) for word in words)
        found.append(unicodedata.normalize("NFC", text))
    return found


def _byte_level(split: str | None) -> Tokenizer:
    library = Tokenizer(models.BPE())
    if split is None:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(training_texts(), trainer)
    library.add_special_tokens([END])
    return library


def _save(library: Tokenizer, directory: Path, **config: Any) -> None:
    directory.mkdir(parents=True)
    library.save(str(directory / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))


def gpt2(directory: Path) -> None:
    _save(_byte_level(None), directory, tokenizer_class="GPT2Tokenizer")


def llama3(directory: Path) -> None:
    _save(_byte_level(_LLAMA3), directory)


def with_added_tokens(directory: Path) -> None:
    """Words that an owner added: recognised in the text as it is or as it is normalised, with blanks around or not."""
    library = _byte_level(_LLAMA3)
    library.normalizer = normalizers.NFC()
    library.add_tokens(
        [
            AddedToken("megatron", normalized=True),
            AddedToken("caf\u00e9", normalized=False),
            AddedToken("<blank>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("word", single_word=True),
        ]
    )
    _save(library, directory)


def wordpiece(directory: Path) -> None:
    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]", END], show_progress=False)
    library.train_from_iterator(training_texts(), trainer)
    _save(library, directory, unk_token="[UNK]")


def sentencepiece(kind: str, **options: Any) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        from sentencepiece import SentencePieceTrainer

        directory.mkdir(parents=True)
        settings: dict[str, Any] = {
            "vocab_size": 600,
            "model_type": kind,
            "byte_fallback": True,
            "bos_id": -1,
            "pad_id": -1,
            "eos_id": 1,
            "unk_id": 0,
            "eos_piece": END,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        }
        lines: Iterator[str] = (line for text in training_texts() for line in text.splitlines() if line)
        SentencePieceTrainer.train(
            sentence_iterator=lines, model_prefix=str(directory / "tokenizer"), minloglevel=2, **(settings | options)
        )
        (directory / "tokenizer.vocab").unlink()

    return make


KINDS: dict[str, Callable[[Path], None]] = {
    "GPT-2": gpt2,
    "Llama 3": llama3,
    "added tokens": with_added_tokens,
    "WordPiece": wordpiece,
    "SentencePiece BPE": sentencepiece("bpe"),
    "SentencePiece BPE without the first blank": sentencepiece("bpe", add_dummy_prefix=False),
    "SentencePiece BPE without bytes": sentencepiece("bpe", byte_fallback=False),
    "SentencePiece unigram": sentencepiece("unigram"),
    "SentencePiece unigram that drops blanks": sentencepiece("unigram", remove_extra_whitespaces=True),
}
