"""A SentencePiece model as tokens of a GGUF file."""

from pathlib import Path
from typing import Any

from checkpoints_convert.formats.gguf.container import Value, ValueType
from checkpoints_convert.formats.gguf.tokens import Tokens, TokenType
from megatron_qwen.errors import ConversionError, Problem

_BPE = 2  # TrainerSpec.ModelType of sentencepiece_model.proto
# ModelProto.SentencePiece.Type -> llama_token_type; the numbers of the others are the same.
_TYPES = {
    1: TokenType.NORMAL,
    2: TokenType.UNKNOWN,
    3: TokenType.CONTROL,
    4: TokenType.USER_DEFINED,
    5: TokenType.UNUSED,
    6: TokenType.BYTE,
}


def sentencepiece_tokens(path: Path) -> Tokens:
    """The pieces of a tokenizer.model.

    Raises:
        ConversionError: it is not a BPE model, or changes text in a way that llama.cpp does not.
    """
    model = _model(path)
    rules = model.normalizer_spec
    problems = []
    if model.trainer_spec.model_type != _BPE:
        fix = "is not a BPE model; llama.cpp's tokenizer of SentencePiece models is BPE."
        problems.append(Problem(str(path), str(model.trainer_spec.model_type), fix))
    if not model.trainer_spec.byte_fallback:
        fix = "has no byte fall-back, which llama.cpp's tokenizer of SentencePiece models needs."
        problems.append(Problem(str(path), None, fix))
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces or not rules.escape_whitespaces:
        fix = "changes text before it is split (normalizer_spec); llama.cpp does not, so its ids would differ."
        problems.append(Problem(str(path), rules.name or None, fix))
    if problems:
        raise ConversionError(problems)
    pieces = [*model.pieces]
    return Tokens(
        "llama",
        "default",
        [str(piece.piece) for piece in pieces],
        [_TYPES[int(piece.type)] for piece in pieces],
        scores=[float(piece.score) for piece in pieces],
        more={"add_space_prefix": Value(ValueType.BOOL, bool(rules.add_dummy_prefix))},
    )


def _model(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # DecodeError of protobuf, whose modules have no types
        model.Clear()
    if not model.pieces:
        raise ConversionError(Problem(str(path), None, "is not a SentencePiece model: damaged, or another file."))
    return model
