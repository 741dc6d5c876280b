"""What in a table of others makes intervals narrower or wider than the truth: noticed, and said with the fit."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from tools.scaling.observations import DONE, Observation

_SIZES, _HORIZONS = 3, 8
_DECIMALS = 2
_BITS = 1.0  # nats: no language model of the published studies has a lower loss on text
_PERPLEXITY = 12.0  # nats: ln of a vocabulary of 160,000, which a model that knows nothing has


def doubts(observations: Sequence[Observation]) -> Iterator[str]:
    """Notes for a reader; nothing is changed.

    Args:
        observations: as they were read.
    """
    done = [one for one in observations if one.status == DONE]
    repeated = sum(count - 1 for count in Counter(map(_values, done)).values())
    if repeated:
        yield f"{repeated} lines repeat another: intervals are narrower than the runs allow, because each is resampled"
    horizons: dict[float, set[float]] = defaultdict(set)
    for one in done:
        horizons[one.params].add(one.tokens)
    crowded = sum(len(tokens) >= _HORIZONS for tokens in horizons.values())
    if crowded and len(horizons) >= _SIZES:
        yield (
            f"{crowded} sizes have {_HORIZONS} or more token counts each: points along one run are not independent, "
            "and before its decay a run is above the law; keep the last of each run"
        )
    if done and all(_is_rounded(one.loss) for one in done):
        yield f"losses have at most {_DECIMALS} decimals: intervals do not contain what rounding took"
    if done and all(one.loss < _BITS for one in done):
        yield "all losses are below 1 nat a token: they may be in bits per byte or of another base"
    if any(one.loss > _PERPLEXITY for one in done):
        yield "losses above 12 nats a token: they may be perplexities, or of diverged runs"


def _values(one: Observation) -> tuple[object, ...]:
    return one.params, one.tokens, one.loss, one.learning_rate, one.batch_tokens, one.total_params, one.granularity


def _is_rounded(loss: float) -> bool:
    return abs(loss - round(loss, _DECIMALS)) < 1e-9
