"""A SentencePiece model in the form of a tokenizer.json, which transformers loads for any kind of model.

The algorithms are the same (BPE by scores, or Unigram); what differs is the form. Whoever converts compares the ids:
a model may have rules, such as user-defined pieces, that the form does not express.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_qwen.errors import ConversionError, Problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_SPACE = "\u2581"  # stands for a blank in a piece
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type


def as_tokenizer_json(path: Path) -> str:
    """The text of a tokenizer.json that does what a model does.

    Args:
        path: tokenizer.model.

    Raises:
        ConversionError: it is not a model, or neither BPE nor Unigram.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # DecodeError of protobuf, whose modules have no types
        model.Clear()
    if not any(piece.type == _UNKNOWN for piece in model.pieces):  # every model has one; other files may parse as empty
        fix = "is not a SentencePiece model: damaged, or a download that did not happen; download it again."
        raise ConversionError(Problem(str(path), None, fix))
    kind = model.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE):
        raise ConversionError(
            Problem(str(path), None, "is neither a BPE nor a Unigram model; no tokenizer.json can be.")
        )
    library: Library = Library(_model(model))
    _around(library, model)
    special = [piece.piece for piece in model.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    library.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    defined = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    library.add_tokens([AddedToken(piece, normalized=False) for piece in defined])
    text: str = library.to_str(pretty=True)
    return text


def _model(model: Any) -> Any:
    from tokenizers import models

    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    unknown = next(index for index, piece in enumerate(model.pieces) if piece.type == _UNKNOWN)
    by_byte = bool(model.trainer_spec.byte_fallback)
    if model.trainer_spec.model_type == _UNIGRAM:
        return models.Unigram(pieces, unknown, by_byte)
    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    return models.BPE(
        vocabulary, list(_merges(model)), unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=by_byte
    )


def _merges(model: Any) -> Iterator[tuple[str, str]]:
    """Pairs whose union is a piece, the best score first; of one piece, in the order of their ids."""
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    merged = [piece for piece in model.pieces if piece.type == _NORMAL and len(piece.piece) > 1]
    for piece in sorted(merged, key=lambda piece: -piece.score):
        cuts = ((piece.piece[:at], piece.piece[at:]) for at in range(1, len(piece.piece)))
        pairs = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        yield from sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _around(library: "Library", model: Any) -> None:
    """Normaliser and decoder."""
    from tokenizers import Regex, decoders, normalizers

    rules = model.normalizer_spec
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    library.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    library.decoder = decoders.Sequence(undo)
