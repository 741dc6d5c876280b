"""What fine-tuning asks of its sources: conversations are read whole, and do not see one another."""

from collections.abc import Iterator, Mapping

from megatron_qwen.config.blend import Blend
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.sources import OpenSource
from megatron_qwen.data.token_files.manifest import MEMBERS
from megatron_qwen.errors import DataError, Problem

_AT_A_TIME = 1 << 20  # lengths that are looked at


def require_whole(sources: Mapping[str, OpenSource], blend: Blend, config: RunConfig) -> None:
    """Raises DataError where conversations would be cut, or attend to one another, or where nothing is masked.

    Sources without a loss mask are texts, which may be mixed in.

    Args:
        sources: of the run.
        blend: their stages.
        config: of the run.
    """
    masked = {name for name, source in sources.items() if any(file.has_mask for file in source.tokens.files)}
    problems = []
    if not masked:
        fix = "has no loss mask: every token would be trained. Prepare conversations (mq data prepare --chat)."
        problems += [Problem(source.where, source.spec.path, fix) for source in sources.values()]
    for name in sorted(masked):
        source = sources[name]
        if source.spec.packing != "best_fit":
            fix = "lets conversations attend to one another and cuts them; set packing to best_fit."
            problems.append(Problem(f"packing of {source.where}", source.spec.packing, fix))
        cut = [stage.name for stage in blend.stages if name in stage.weights and stage.lengths]
        if cut:
            fix = f"cuts conversations of {source.where} into parts; give text a stage of its own."
            problems.append(Problem(f"lengths of stage {', '.join(cut)}", None, fix))
        lengths = {stage.configure(config).data.seq_length for stage in blend.stages if name in stage.weights}
        if longer := _longer(source, min(lengths)):
            fix = (
                f"are longer than data.seq_length = {min(lengths):,} and would be cut; "
                "raise it, or prepare them with --max-tokens."
            )
            problems.append(Problem(source.where, f"{longer:,} conversations", fix))
    if problems:
        raise DataError(problems)


def require_pairs_or_none(sources: Mapping[str, OpenSource], config: RunConfig) -> None:
    """Raises DataError for sources of other documents where pairs are wanted, and the other way round."""
    if problems := list(_other_kinds(sources, wants_pairs=config.objective.of_pairs, config=config)):
        raise DataError(problems)


def require_reference(blend: Blend, config: RunConfig) -> None:
    """Raises DataError for sources that the reference's pass, over the first stage's rows, would not meet."""
    if config.objective.kind != "dpo":
        return
    first = blend.stages[0]
    met = {name for name, weight in first.weights.items() if weight > 0}
    later = {name: stage.name for stage in blend.stages[1:] for name in stage.weights if name not in met}
    fix = f"is not in the first stage, {first.name}, whose rows the reference reads; give both stages the same sources."
    if later:
        raise DataError([Problem(f"source {name} of stage {stage}", None, fix) for name, stage in later.items()])


def _other_kinds(sources: Mapping[str, OpenSource], *, wants_pairs: bool, config: RunConfig) -> Iterator[Problem]:
    for source in sources.values():
        has_pairs = source.chat.get(MEMBERS, 1) == 2
        if wants_pairs and not has_pairs:
            kind = config.objective.kind
            fix = f"has no pairs of answers, which objective.kind={kind} needs (mq data prepare --pairs)."
            yield Problem(source.where, source.spec.path, fix)
        elif has_pairs and not wants_pairs:
            fix = (
                f"has pairs of answers, of which objective.kind={config.objective.kind} would train the rejected, too."
            )
            yield Problem(source.where, source.spec.path, fix)


def _longer(source: OpenSource, length: int) -> int:
    count = 0
    for first in range(0, source.tokens.num_documents, _AT_A_TIME):
        some = source.tokens.lengths(first, min(first + _AT_A_TIME, source.tokens.num_documents))
        count += int((some > length).sum())
    return count
