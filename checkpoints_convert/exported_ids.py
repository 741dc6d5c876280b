"""Token ids of an export (eos, bos, pad) in config.json and generation_config.json: those of the tokenizer in it.

A directory may hold a config.json or a generation_config.json of another model, and --tokenizer may name another
tokenizer than the one of the directory that the model was converted from: ids of either are not this tokenizer's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints_convert.answering import answer_ends
from checkpoints_convert.checkpoint_source import CheckpointSource
from checkpoints_convert.hf_directory import GENERATION
from megatron_qwen.checkpoint.paths import TOKENIZER
from megatron_qwen.data.tokenizers.named_ids import special_ids
from megatron_qwen.data.tokenizers.tokenizer import file_sha256, fingerprint, load_tokenizer
from megatron_qwen.errors import DataError
from megatron_qwen.hf.kept import IDS
from megatron_qwen.hf.sampling import SAMPLING

_MOST_NEW_TOKENS = 256  # transformers' own default is 20, which cuts off any answer


def token_ids(source: CheckpointSource, said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """eos, bos and, where the source has one, pad: as a config.json has them, else from the tokenizer.

    Args:
        source: the checkpoint.
        said: config.json of this model with this tokenizer, the first counts.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    ends = answer_ends(source)
    own = {} if ends is None else {"eos_token_id": ends.turn}
    for content in said:
        if content.get("eos_token_id") is not None:
            return {name: content.get(name) for name in IDS if name in content or name != "pad_token_id"} | own
    eos, bos = None, None
    if source.tokenizer is not None:
        try:
            eos, bos = special_ids(source.tokenizer, below=source.config.model.vocab_size)
        except DataError:
            if not said:
                raise
    return {"eos_token_id": eos, "bos_token_id": bos} | own


def has_other_tokenizer(source: CheckpointSource) -> bool:
    """Whether --tokenizer names a tokenizer that gives other ids than the one the model was converted with."""
    own = source.path / TOKENIZER
    if source.tokenizer is None or source.tokenizer == own:
        return False
    try:
        same = file_sha256(source.tokenizer) == file_sha256(own)
        return not same and fingerprint(source.tokenizer) != fingerprint(own)
    except DataError:  # one of them is missing, or is of files that nothing here reads
        return True


def ids_fit(content: Mapping[str, Any], vocab_size: int) -> bool:
    """Whether a vocabulary has all token ids of a config.json or generation_config.json."""
    return all(0 <= index < vocab_size for name in IDS for index in _as_list(content.get(name)))


def generation_of_source(source: CheckpointSource) -> dict[str, Any] | None:
    """generation_config.json of the directory that a checkpoint was converted from, if its ids are the tokenizer's."""
    noted = source.state.get("converted_from")
    content = noted.get(GENERATION) if isinstance(noted, dict) else None
    if not isinstance(content, dict) or has_other_tokenizer(source) or not _ends_answers(source, content):
        return None
    return content


def generation_of_tokenizer(source: CheckpointSource) -> dict[str, Any] | None:
    """generation_config.json among the tokenizer's files, which go into the export byte for byte; None where there is
    none, or one of another model.
    """
    try:
        content = json.loads(((source.tokenizer or Path()) / GENERATION).read_bytes()) if source.tokenizer else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    if not _ends_answers(source, content):
        return None
    # What a published directory says comes back as it was, whatever it says.
    fits = ids_fit(content, source.config.model.vocab_size) or content == generation_of_source(source)
    return content if fits else None


def new_generation(source: CheckpointSource, ids: Mapping[str, Any]) -> dict[str, Any] | None:
    """generation_config.json to write; None where that of the tokenizer's files goes along."""
    if generation_of_tokenizer(source) is not None:
        return None
    ends = answer_ends(source)
    if ends is not None and generation_of_source(source) is None:
        pad = {} if ends.text is None else {"pad_token_id": ends.text}
        return {"bos_token_id": ids.get("bos_token_id"), **pad, "eos_token_id": ends.both, **SAMPLING}
    own = {**{name: ids.get(name) for name in ("bos_token_id", "eos_token_id")}, "max_new_tokens": _MOST_NEW_TOKENS}
    return generation_of_source(source) or own


def does_not_stop(source: CheckpointSource, ids: Mapping[str, Any]) -> str | None:
    """Why text that the export generates may not end; None where it ends as the documents of the training did.

    Args:
        source: the checkpoint. What was converted and not trained here is as its publishers wanted it.
        ids: config.json of the export.
    """
    if source.tokenizer is None or "converted_from" in source.state:
        return None
    generation = generation_of_tokenizer(source) or new_generation(source, ids) or {}
    # transformers takes the ids of generation_config.json where it has some, else those of config.json.
    chosen = _as_list(generation.get("eos_token_id")) or _as_list(ids.get("eos_token_id"))
    if not chosen:
        return "the tokenizer names no token that ends a text: eos_token_id is null, and text ends at a length only"
    end = document_end(source.tokenizer)
    if end is None or end in chosen:
        return None
    return (
        f"documents end with id {end}, and eos_token_id is {', '.join(map(str, chosen))}: a model that was trained on "
        f"documents alone does not stop. Put {GENERATION} with an eos_token_id that has both next to the tokenizer"
    )


def document_end(tokenizer: Path) -> int | None:
    """Id that ends a document; None where the tokenizer has none."""
    try:
        return load_tokenizer(tokenizer).end_of_text
    except DataError:
        return None


def _ends_answers(source: CheckpointSource, generation: Mapping[str, Any]) -> bool:
    """Whether a generation_config.json stops at the end of a turn, if the model was trained to answer."""
    ends = answer_ends(source)
    return ends is None or ends.turn in _as_list(generation.get("eos_token_id"))


def _as_list(ids: Any) -> list[int]:
    found = ids if isinstance(ids, list) else [ids]
    return [index for index in found if isinstance(index, int)]
