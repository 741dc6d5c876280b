"""What a run will read, before it runs: steps, samples, tokens and epochs of every stage and source."""

from dataclasses import dataclass

from megatron_qwen.config.batch_size import global_batch_size
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.errors import Problem


@dataclass(frozen=True)
class SourceShare:
    """A source in a stage.

    Args:
        name: of the source.
        weight: its share of the samples.
        tokens: that it gives in the stage; padding of packed rows is a part of them.
        epochs: how often the stage reads it, without padding.
        epochs_so_far: how often it has been read at the end of the stage.
    """

    name: str
    weight: float
    tokens: int
    epochs: float
    epochs_so_far: float


@dataclass(frozen=True)
class StagePlan:
    """A stage.

    Args:
        name: of the stage.
        steps: optimizer steps.
        samples: samples of all of them.
        seq_length: tokens of a sample.
        rotary_base: RoPE base.
        global_batch_size: samples of its last step.
        tokens: of all samples.
        sources: what they come from.
    """

    name: str
    steps: int
    samples: int
    seq_length: int
    rotary_base: float
    global_batch_size: int
    tokens: int
    sources: tuple[SourceShare, ...]


def plan(data: TrainingData, *, iteration: int = 0) -> list[StagePlan]:
    """The stages that the run's steps reach, in order, from the present position of the data.

    Args:
        data: of the run, at its beginning or where it has resumed.
        iteration: steps taken so far.
    """
    left = data.config.training.train_iters - iteration
    read = dict.fromkeys(data.sources, 0.0)
    used: dict[str, int] = {}
    for entry in data.ledger(data.consumed):
        used[entry.stage] = used.get(entry.stage, 0) + entry.samples * entry.seq_length
        for name, count in entry.counts.items():
            if name in read:
                read[name] += count * data.tokens_per_sample(name, entry.seq_length) / data.sources[name].stop
    names = [stage.name for stage in data.blend.stages]
    first = names.index(data.at(data.consumed).stage.name) if iteration else 0
    found, consumed = [], data.consumed
    for index, stage in enumerate(data.blend.stages):
        if left == 0:
            break
        if index < first:
            continue
        config = stage.configure(data.config)
        last = index + 1 == len(data.blend.stages)
        rest = max((stage.tokens or 0) - used.get(stage.name, 0), 0)
        limit = None if last or stage.tokens is None else -(-rest // config.data.seq_length)
        steps, samples, batch = _steps(config, consumed, limit, left)
        tokens = samples * config.data.seq_length
        shares = []
        for name, weight in stage.weights.items():
            # Positions fill the stage, and tokens use up the source: rows of whole documents have fewer tokens.
            own = samples * weight * data.tokens_per_sample(name, config.data.seq_length)
            epochs = own / data.sources[name].stop
            read[name] += epochs
            shares.append(SourceShare(name, weight, round(tokens * weight), epochs, read[name]))
        found.append(
            StagePlan(
                stage.name, steps, samples, config.data.seq_length, config.rope.base, batch, tokens, tuple(shares)
            )
        )
        left -= steps
        consumed += samples
    return found


def warnings(data: TrainingData, stages: list[StagePlan]) -> list[Problem]:
    """Sources that are read too often, and stages that the run does not reach or that outlast their budget."""
    found = []
    totals = {share.name: share.epochs_so_far for stage in stages for share in stage.sources}
    for name, epochs in totals.items():
        source = data.sources[name]
        if epochs > source.spec.max_epochs:
            fix = (
                f"would be read {epochs:.1f} times; max_epochs is {source.spec.max_epochs:g}. Repeating data more than "
                "4 times adds little (arXiv 2305.16264); add data, or lower its weight."
            )
            found.append(Problem(source.where, f"{source.stop:,} tokens", fix))
    reached = {stage.name for stage in stages} | {entry.stage for entry in data.ledger(data.consumed)}
    for stage in data.blend.stages:
        if stage.name not in reached:
            fix = f"is never reached: the run ends before it (training.train_iters={data.config.training.train_iters})."
            found.append(Problem(f"stage {stage.name}", None, fix))
    final = data.blend.stages[-1]
    if stages and stages[-1].name == final.name and final.tokens is not None:
        earlier = sum(
            entry.samples * entry.seq_length for entry in data.ledger(data.consumed) if entry.stage == final.name
        )
        over, under = stages[-1].tokens + earlier - final.tokens, final.tokens - stages[-1].tokens - earlier
        step = stages[-1].global_batch_size * stages[-1].seq_length
        if over >= step:
            found.append(
                Problem(f"stage {final.name}", None, f"continues {over:,} tokens beyond its {final.tokens:,}.")
            )
        elif under > 0:
            found.append(Problem(f"stage {final.name}", None, f"ends {under:,} tokens short of its {final.tokens:,}."))
    return found


def _steps(config: RunConfig, consumed: int, limit: int | None, most: int) -> tuple[int, int, int]:
    """Steps and samples until a limit of samples is reached or the run ends, and the last batch."""
    steps = samples = 0
    batch = global_batch_size(consumed, config.training)
    while steps < most and (limit is None or samples < limit):
        batch = global_batch_size(consumed + samples, config.training)
        if batch == config.training.global_batch_size:  # the ramp is over
            rest = most - steps if limit is None else min(most - steps, -(-(limit - samples) // batch))
            return steps + rest, samples + rest * batch, batch
        steps += 1
        samples += batch
    return steps, samples, batch
