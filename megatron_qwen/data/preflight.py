"""Whether data, tokenizer and model belong together; asked before any rank starts."""

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.prepare import read_manifest
from megatron_qwen.data.samples import open_split
from megatron_qwen.data.tokenizer import fingerprint, load_tokenizer
from megatron_qwen.errors import DataError, Problem

# Of a file that another program made, so many tokens are searched for ids that the embedding does not have.
_LOOKED_AT = 1 << 24


def require_usable(config: RunConfig) -> str | None:
    """Opens the data as a rank will, and compares it with the tokenizer and the embedding.

    Returns:
        The hash of the token file as its manifest notes it, or None where there is no manifest.

    Raises:
        DataError: with every mismatch.
    """
    split = open_split(config.data, seed=config.training.seed, validate=config.training.eval_iters > 0)
    assert config.data.path is not None
    problems = []
    noted = read_manifest(config.data.path)
    if noted is not None and noted["vocab_size"] > config.model.vocab_size:
        problems.append(
            Problem(
                "model.vocab_size",
                config.model.vocab_size,
                f"{config.data.path} was made with {noted['vocab_size']} ids; raise it.",
            )
        )
    if noted is None:
        largest = int(split.train.file.tokens(0, _LOOKED_AT).max())
        if largest >= config.model.vocab_size:
            fix = f"{config.data.path} holds the id {largest}; raise it."
            problems.append(Problem("model.vocab_size", config.model.vocab_size, fix))
    if config.data.tokenizer is not None:
        size = load_tokenizer(config.data.tokenizer).vocab_size
        if size > config.model.vocab_size:
            problems.append(
                Problem(
                    "model.vocab_size",
                    config.model.vocab_size,
                    f"the tokenizer {config.data.tokenizer} has {size} ids; raise it.",
                )
            )
        if noted is not None and noted["tokenizer_sha256"] != fingerprint(config.data.tokenizer):
            problems.append(
                Problem(
                    "data.tokenizer",
                    config.data.tokenizer,
                    f"is not the tokenizer {config.data.path} was made with; name that one or prepare the data again.",
                )
            )
    if problems:
        raise DataError(problems)
    return None if noted is None else str(noted["bin_xxh3_128"])
