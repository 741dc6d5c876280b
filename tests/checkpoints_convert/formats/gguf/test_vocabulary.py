"""llama.cpp gives the ids of the tokenizer that was put into a file; what it cannot split is refused."""

import json
import shutil
import unicodedata

import pytest
import transformers

from checkpoints_convert.compare.sides import open_side
from checkpoints_convert.formats.gguf.reading import GgufFile
from checkpoints_convert.formats.gguf.writing import GgufOptions, write_gguf
from megatron_qwen.data.tokenizers.encoder import PROBES
from megatron_qwen.data.tokenizers.making import train_sentencepiece
from megatron_qwen.data.tokenizers.tokenizer import TOKENIZER_FILES, load_tokenizer
from megatron_qwen.errors import ConversionError
from tests.checkpoints_convert.formats.gguf.llama_cpp import LlamaModel
from tests.checkpoints_convert.formats.gguf.models import TEXT, make
from tests.data.tokenizers.kinds import texts_of_all_scripts
from tests.tiers import count

TEXTS = [
    *(unicodedata.normalize("NFC", text) for text in PROBES),
    *texts_of_all_scripts(count(quick=40, thorough=2000)),
    "<think>a</think><tool_call>{}",
]


@pytest.fixture
def directory(side, tmp_path):
    shutil.copytree(side("qwen2 narrow").path, tmp_path / "hf")
    return tmp_path / "hf"


def written(directory, tmp_path):
    write_gguf(open_side(directory), tmp_path / "out", ["Q8_0"], GgufOptions(name="m", quiet=True))
    return tmp_path / "out" / "m-Q8_0.gguf"


def change(directory, edit):
    content = json.loads((directory / "tokenizer.json").read_text())
    edit(content)
    (directory / "tokenizer.json").write_text(json.dumps(content))


def assert_same_ids(path, directory, *, control=True):
    ours = load_tokenizer(directory).encode_batch(TEXTS)
    with LlamaModel(path) as theirs:
        differing = [text for text, ids in zip(TEXTS, ours, strict=True) if theirs.encode(text, control=control) != ids]
    assert not differing, differing[:3]


def test_qwens_split(directory, tmp_path):
    template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    path = written(directory, tmp_path)
    assert_same_ids(path, directory)
    keys = GgufFile(path).keys
    assert keys["tokenizer.ggml.pre"] == "qwen2"
    assert keys["tokenizer.chat_template"] == template
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert (len(tokens), tokens[597:602]) == (
        640,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD600]", "[PAD601]"],
    )
    assert types[596:602] == [1, 3, 3, 3, 5, 5]
    assert keys["tokenizer.ggml.eos_token_id"] == 597
    assert keys["tokenizer.ggml.add_bos_token"] is False


def test_control_tokens_of_a_text_stay_text_where_that_is_asked_for(directory, tmp_path):
    with LlamaModel(written(directory, tmp_path)) as theirs:
        ids = theirs.encode("a<|im_end|>", control=False)
    assert ids == load_tokenizer(directory).encode_batch(["a<|im_end|>"], control_as_text=True)[0]


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "pre"),
    [("|\\p{N}{1,3}|", False, "dbrx"), ("|\\p{N}{1,3}|", True, "llama-bpe"), ("|\\p{N}|", False, "qwen2")],
)
def test_other_splits(directory, tmp_path, pattern, ignore_merges, pre):
    def edit(content):
        split = content["pre_tokenizer"]["pretokenizers"][0]
        split["pattern"]["Regex"] = split["pattern"]["Regex"].replace("|\\p{N}|", pattern)
        content["model"]["ignore_merges"] = ignore_merges

    change(directory, edit)
    path = written(directory, tmp_path)
    assert GgufFile(path).keys["tokenizer.ggml.pre"] == pre
    assert_same_ids(path, directory)


def test_gpt2s_split(directory, tmp_path):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    change(directory, lambda content: content.update(pre_tokenizer=byte_level))
    path = written(directory, tmp_path)
    assert GgufFile(path).keys["tokenizer.ggml.pre"] == "gpt-2"
    assert_same_ids(path, directory)


def test_a_wrong_name_gives_other_ids(directory, tmp_path):
    """Negative control: the texts tell the splits apart."""
    path = written(directory, tmp_path)
    data = path.read_bytes()
    assert data.count(b"\x05\0\0\0\0\0\0\0qwen2") >= 2  # the architecture's name has the same five letters
    path.write_bytes(data.replace(b"pre\x08\0\0\0\x05\0\0\0\0\0\0\0qwen2", b"pre\x08\0\0\0\x05\0\0\0\0\0\0\0gpt-2"))
    with pytest.raises(AssertionError):
        assert_same_ids(path, directory)


def test_sentencepiece(directory, tmp_path):
    for name in TOKENIZER_FILES:
        (directory / name).unlink(missing_ok=True)
    train_sentencepiece([TEXT.read_text()], directory, vocab_size=600)
    path = written(directory, tmp_path)
    assert GgufFile(path).keys["tokenizer.ggml.model"] == "llama"
    assert_same_ids(path, directory, control=False)  # a SentencePiece model takes none of control from a text


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\d+|\s+"), "pattern"),
        (lambda content: content.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda content: content["added_tokens"][0].update(lstrip=True), "lstrip"),
        (lambda content: content["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    ],
)
def test_what_llama_cpp_splits_otherwise_is_refused(directory, tmp_path, edit, says):
    change(directory, edit)
    with pytest.raises(ConversionError, match=says):
        written(directory, tmp_path)
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_rows_are_refused(tmp_path):
    directory = make("qwen2 narrow", tmp_path / "hf", vocab_size=700)
    with pytest.raises(ConversionError, match="rows"):
        written(directory, tmp_path)


def test_transformers_sees_the_template(directory, tmp_path):
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    path = written(directory, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
