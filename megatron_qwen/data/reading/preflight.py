"""Checks that data, tokenizer and model fit together, before any rank starts."""

from megatron_qwen.config.checks import packed_sequence_problems
from megatron_qwen.config.checks import problems as config_problems
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.sources import OpenSource
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.data.token_files.manifest import Manifest, read_manifest
from megatron_qwen.data.tokenizers.tokenizer import file_sha256, fingerprint, load_tokenizer
from megatron_qwen.errors import ConfigError, DataError, Problem

# A file of another program has no manifest: this many tokens of it are searched for ids beyond the embedding.
_LOOKED_AT = 1 << 24


def require_usable(config: RunConfig, *, world_size: int | None = None) -> TrainingData:
    """Opens the data as a rank will, and compares it with the tokenizer and the embedding.

    Args:
        config: of the run.
        world_size: ranks the run is to have, where that is known: the batches of every stage must fall on them.

    Raises:
        ConfigError: a stage cannot be run as it is configured.
        DataError: with every mismatch.
    """
    data = TrainingData(config)
    require_legal_stages(data, world_size=world_size)
    if config.training.eval_iters and config.data.validation_fraction:
        for stage in data.blend.stages:
            data.validation_of(stage)
    problems = [problem for source in data.sources.values() for problem in _mismatches(source, config)]
    if config.data.tokenizer is not None:
        size = load_tokenizer(config.data.tokenizer).vocab_size
        if size > config.model.vocab_size:
            fix = f"is smaller than the {size} ids of the tokenizer {config.data.tokenizer}; raise it."
            problems.append(Problem("model.vocab_size", config.model.vocab_size, fix))
    if problems:
        raise DataError(problems)
    return data


def require_legal_stages(data: TrainingData, *, world_size: int | None) -> None:
    """Raises ConfigError with every problem of the configuration in force in each data stage.

    Args:
        data: of the run.
        world_size: ranks of the run; None leaves out what depends on them.
    """
    found = []
    for stage in data.blend.stages:
        config = stage.configure(data.config)
        # Problems of the run's own configuration are reported elsewhere.
        wrong = config_problems(config, world_size=world_size) if config != data.config else []
        if data.is_packed(stage) and not config.data.reset_attention_mask:
            wrong += packed_sequence_problems(config, Problem("lengths" if stage.lengths else "packing", None, ""))
        found += [Problem(f"stage {stage.name}: {one.where}", one.value, one.fix) for one in wrong]
    if found:
        raise ConfigError(found)


def _is_made_with(noted: Manifest, tokenizer: str) -> bool:
    return noted.tokenizer_sha256 in (fingerprint(tokenizer), file_sha256(tokenizer))


def _mismatches(source: OpenSource, config: RunConfig) -> list[Problem]:
    """What is wrong between one source and the rest."""
    size, path = config.model.vocab_size, source.spec.path
    noted = read_manifest(source.tokens.prefix)
    problems = []
    if noted is not None and noted.vocab_size > size:
        fix = f"is smaller than the {noted.vocab_size} ids that {path} was prepared with; raise it."
        problems.append(Problem("model.vocab_size", size, fix))
    if noted is None:
        largest = int(source.tokens.tokens(0, min(_LOOKED_AT, source.tokens.num_tokens)).max())
        if largest >= size:
            problems.append(
                Problem("model.vocab_size", size, f"is too small: {path} contains the id {largest}; raise it.")
            )
    tokenizer = config.data.tokenizer
    if noted is not None and tokenizer is not None and not _is_made_with(noted, tokenizer):
        fix = f"is not the tokenizer that {path} was prepared with; use that one or prepare the data again."
        problems.append(Problem("data.tokenizer", tokenizer, fix))
    if source.spec.fim_rate and noted is None:
        fix = f"needs the ids of control tokens, and {path} has no manifest; set it to 0."
        problems.append(Problem(f"sources.{source.name}.fim_rate", source.spec.fim_rate, fix))
    elif source.spec.fim_rate:
        assert source.fim is not None
    return problems
