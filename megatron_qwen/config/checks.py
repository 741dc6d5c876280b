"""Which combinations of fields are legal. Every rule is one generator; ``problems`` runs them all.

A rule that depends on the number of ranks is asked only where that number is known.
"""

from collections.abc import Iterator

from megatron_qwen.config.checkpoint_checks import checkpoint_problems
from megatron_qwen.config.evaluation_checks import evaluation_problems
from megatron_qwen.config.fields import bound_problems
from megatron_qwen.config.lora_checks import lora_problems
from megatron_qwen.config.objective_checks import objective_problems
from megatron_qwen.config.pipeline import StageSplitError, layers_per_stage
from megatron_qwen.config.run import SECTION_TYPES, RunConfig
from megatron_qwen.config.sections import RopeConfig
from megatron_qwen.errors import ConfigError, Problem


def problems(config: RunConfig, *, world_size: int | None = None) -> list[Problem]:
    """Everything that is wrong with a configuration.

    Args:
        config: the resolved configuration.
        world_size: ranks the run is to have; None skips the rules about batch and data parallelism.
    """
    found = [problem for section in SECTION_TYPES for problem in bound_problems(section, getattr(config, section))]
    if found:
        return found  # the rules divide by sizes that must be positive
    for rule in (
        _shape, _data, _moe, _tensor, _pipeline, _context, _expert, _precision, _optimizer, _recompute,
        checkpoint_problems, evaluation_problems, objective_problems, lora_problems,
    ):  # fmt: skip
        found += rule(config)
    if world_size is not None:
        found += _world(config, world_size)
    return found


def require_legal(config: RunConfig, *, world_size: int | None = None) -> None:
    """Raises ConfigError with every problem, or returns."""
    if found := problems(config, world_size=world_size):
        raise ConfigError(found)


def _indivisible(where: str, value: int, by: int, what: str, fix: str) -> Iterator[Problem]:
    """A problem where ``value`` is no multiple of ``by``; ``what`` says what ``by`` is, ``fix`` what to do."""
    if by and value % by:
        yield Problem(where, value, f"must be divisible by {what} = {by}; {fix}")


def _nearest_multiples(value: int, of: int) -> str:
    """The multiples around a value, for a message: ``use 8 or 12.``"""
    below = value // of * of
    return f"use {below} or {below + of}." if below else f"use {of}."


def _shape(config: RunConfig) -> Iterator[Problem]:
    model, data = config.model, config.data
    if model.kv_channels is None:
        yield from _indivisible(
            "model.hidden_size",
            model.hidden_size,
            model.num_attention_heads,
            "model.num_attention_heads",
            "change one of them, or set model.kv_channels.",
        )
    if model.head_dim % 2:
        yield Problem("model.kv_channels", model.head_dim, "the head dimension must be even for RoPE.")
    yield from _indivisible(
        "model.num_attention_heads",
        model.num_attention_heads,
        model.num_query_groups,
        "model.num_query_groups",
        "each KV head serves the same number of query heads (grouped-query attention).",
    )
    if data.seq_length > model.max_position_embeddings:
        yield Problem(
            "data.seq_length",
            data.seq_length,
            f"exceeds model.max_position_embeddings = {model.max_position_embeddings}; lower data.seq_length or raise "
            "model.max_position_embeddings.",
        )
    yield from rope_problems(config.rope)


def rope_problems(rope: RopeConfig) -> Iterator[Problem]:
    """What the fields of the rope section require of one another."""
    if rope.kind == "default" and rope.scaling != 1:
        fix = f"must be 1 with rope.kind={rope.kind}, which does not extend the context; set rope.scaling=1."
        yield Problem("rope.scaling", rope.scaling, fix)


def _data(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if data.path is not None and data.blend is not None:
        yield Problem("data.blend", data.blend, "cannot be combined with data.path; set one of them to null.")
    if data.reset_attention_mask:
        yield from packed_sequence_problems(config, Problem("data.reset_attention_mask", "true", ""))


def packed_sequence_problems(config: RunConfig, asked: Problem) -> Iterator[Problem]:
    """What packed sequences (several sequences in one sample) require of the rest of a configuration.

    Args:
        config: of the run, or of a stage.
        asked: the field that packs the sequences, and its value; its message is replaced.
    """
    if config.parallel.context_parallel_size > 1 and config.training.micro_batch_size > 1:
        # Context parallelism splits one row into chunks; with several rows, the packed sequences of a micro-batch are
        # concatenated into one, whose boundaries would no longer match the chunks.
        fix = (
            "with context parallelism, packed sequences require training.micro_batch_size=1; "
            "set it to 1, or parallel.context_parallel_size=1."
        )
        yield Problem(asked.where, asked.value, fix)


def _moe(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if not model.is_moe:
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
            if getattr(model, name) is not None:
                yield Problem(
                    f"model.{name}",
                    getattr(model, name),
                    "requires model.num_moe_experts; set that field, or remove this one.",
                )
        return
    assert model.num_moe_experts is not None
    if model.moe_ffn_hidden_size is None:
        yield Problem("model.moe_ffn_hidden_size", "null", "must be set, because model.num_moe_experts is set.")
    if model.moe_router_topk > model.num_moe_experts:
        yield Problem(
            "model.moe_router_topk",
            model.moe_router_topk,
            f"must be at most model.num_moe_experts = {model.num_moe_experts}.",
        )
    if model.moe_router_topk == 1 and not model.moe_router_pre_softmax:
        # Renormalised over one expert, the routing weight is the constant 1: the router would get no gradient.
        fix = "must be true when model.moe_router_topk=1: renormalised, the weight of the only expert is always 1."
        yield Problem("model.moe_router_pre_softmax", "false", fix)
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        yield Problem(
            "model.moe_shared_expert_gate",
            "true",
            "requires a shared expert; set model.moe_shared_expert_intermediate_size.",
        )


def _tensor(config: RunConfig) -> Iterator[Problem]:
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    if tp == 1:
        if parallel.sequence_parallel:
            yield Problem(
                "parallel.sequence_parallel",
                "true",
                "requires parallel.tensor_model_parallel_size > 1; set it to false.",
            )
        return
    groups = model.num_query_groups
    if groups % tp:
        sizes = ", ".join(str(size) for size in range(1, groups + 1) if groups % size == 0)
        yield Problem(
            "parallel.tensor_model_parallel_size",
            tp,
            f"must divide the {groups} KV heads (model.num_query_groups); use one of {sizes}.",
        )
    for name in ("num_attention_heads", "ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        size = getattr(model, name)
        if size is not None:
            yield from _indivisible(
                f"model.{name}", size, tp, "parallel.tensor_model_parallel_size", "choose another size."
            )
    if model.is_moe and not parallel.sequence_parallel:
        yield Problem(
            "parallel.sequence_parallel",
            "false",
            "must be true for a mixture-of-experts model with tensor parallelism.",
        )
    if parallel.sequence_parallel and config.data.seq_length % (tp * parallel.context_parallel_size):
        yield Problem(
            "data.seq_length",
            config.data.seq_length,
            f"must be divisible by TP x CP = {tp * parallel.context_parallel_size} with sequence parallelism; "
            + _nearest_multiples(config.data.seq_length, tp * parallel.context_parallel_size),
        )


def _pipeline(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    pp, vp = parallel.pipeline_model_parallel_size, parallel.virtual_stages
    if vp > 1 and pp == 1:
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            vp,
            "requires parallel.pipeline_model_parallel_size > 1; set it to null.",
        )
    if vp > 1 and pp == 2 and not parallel.overlap_p2p_comm:
        yield Problem(
            "parallel.overlap_p2p_comm",
            "false",
            "must be true for the interleaved schedule with pipeline size 2: batched sends give wrong gradients.",
        )
    try:
        layers_per_stage(config.model.num_layers, parallel)
    except StageSplitError as error:
        yield Problem("model.num_layers", config.model.num_layers, str(error))


def _context(config: RunConfig) -> Iterator[Problem]:
    cp = config.parallel.context_parallel_size
    if cp > 1:
        yield from _indivisible(
            "data.seq_length",
            config.data.seq_length,
            2 * cp,
            "2 x context_parallel_size",
            f"{_nearest_multiples(config.data.seq_length, 2 * cp)[:-1]} (each rank holds two chunks of the sequence).",
        )
        if config.model.attention_dropout:
            yield Problem(
                "model.attention_dropout",
                config.model.attention_dropout,
                "must be 0 with context parallelism; set it to 0.",
            )


def _expert(config: RunConfig) -> Iterator[Problem]:
    model, parallel = config.model, config.parallel
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if not model.is_moe:
        if ep > 1:
            yield Problem("parallel.expert_model_parallel_size", ep, "must be 1: the model has no experts.")
        if etp is not None and etp != parallel.tensor_model_parallel_size:
            yield Problem("parallel.expert_tensor_parallel_size", etp, "must be null: the model has no experts.")
        return
    assert model.num_moe_experts is not None
    if model.num_moe_experts % ep:
        yield Problem(
            "parallel.expert_model_parallel_size", ep, f"must divide model.num_moe_experts = {model.num_moe_experts}."
        )
    if model.moe_ffn_hidden_size is not None:
        yield from _indivisible(
            "model.moe_ffn_hidden_size",
            model.moe_ffn_hidden_size,
            parallel.expert_tensor_size,
            "parallel.expert_tensor_parallel_size",
            "choose another size.",
        )


def _precision(config: RunConfig) -> Iterator[Problem]:
    precision = config.precision
    if precision.fp8 and precision.backend == "torch" and not precision.emulate_fp8:
        yield Problem(
            "precision.fp8",
            precision.fp8,
            "requires Transformer Engine on a GPU; set precision.backend=te, or precision.emulate_fp8=true.",
        )
    if precision.fp8 and precision.dtype != "bf16" and not precision.emulate_fp8:
        yield Problem("precision.fp8", precision.fp8, "requires precision.dtype=bf16 for the operations outside FP8.")
    if precision.use_precision_aware_optimizer and (precision.backend == "torch" or precision.dtype != "bf16"):
        fix = "requires the Adam of Transformer Engine and bf16; set precision.backend=te and precision.dtype=bf16."
        yield Problem("precision.use_precision_aware_optimizer", "true", fix)
    if not precision.use_precision_aware_optimizer:
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            if (value := getattr(precision, name)) != "fp32":
                yield Problem(
                    f"precision.{name}",
                    value,
                    "requires precision.use_precision_aware_optimizer=true; set that field, or this one to fp32.",
                )
    if precision.fp8 and precision.first_last_layers_bf16 and precision.fp8 != "delayed":
        share = config.model.num_layers // config.parallel.pipeline_model_parallel_size
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if (value := getattr(precision, name)) > share:
                yield Problem(f"precision.{name}", value, f"must be at most the {share} layers of a pipeline stage.")
    if precision.emulate_fp8 and precision.fp8 not in ("tensorwise", "blockwise"):
        yield Problem(
            "precision.emulate_fp8",
            "true",
            "emulates precision.fp8=tensorwise or blockwise; set precision.fp8 to one of them.",
        )
    if precision.emulate_fp8 and precision.backend == "te":
        yield Problem(
            "precision.emulate_fp8", "true", "requires the torch backend; set precision.backend=torch or auto."
        )


def _optimizer(config: RunConfig) -> Iterator[Problem]:
    optim, parallel, iters = config.optim, config.parallel, config.training.train_iters
    if optim.min_learning_rate > optim.learning_rate:
        yield Problem(
            "optim.min_learning_rate",
            optim.min_learning_rate,
            f"exceeds optim.learning_rate = {optim.learning_rate}; lower it.",
        )
    decay_end = optim.lr_decay_iters or iters
    if optim.lr_warmup_iters and optim.lr_warmup_iters >= decay_end:
        yield Problem(
            "optim.lr_warmup_iters",
            optim.lr_warmup_iters,
            f"must be below the end of the decay, iteration {decay_end}.",
        )
    wsd_decay = optim.lr_wsd_decay_iters or max(1, decay_end // 10)  # the default of optim/schedule.py
    if optim.lr_decay_style == "wsd" and wsd_decay + optim.lr_warmup_iters > decay_end:
        message = f"warm-up and decay ({wsd_decay}) together exceed the {decay_end} iterations of the schedule."
        yield Problem("optim.lr_wsd_decay_iters", optim.lr_wsd_decay_iters, message)
    if not parallel.use_distributed_optimizer:
        yield Problem(
            "parallel.use_distributed_optimizer",
            "false",
            "must be true: checkpoints that can be loaded under any layout require the distributed optimizer.",
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield Problem(
            "parallel.overlap_param_gather", "true", "requires parallel.overlap_grad_reduce=true; set both or neither."
        )


def _recompute(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    moe_only = {"moe", "moe_act", "shared_experts"}
    if training.recompute_granularity == "selective":
        if not training.recompute_modules:
            yield Problem("training.recompute_modules", "[]", "must name at least one module for selective recompute.")
        for name in training.recompute_modules:
            if (name in moe_only and not config.model.is_moe) or (name == "mlp" and config.model.is_moe):
                yield Problem("training.recompute_modules", name, "does not exist in this model.")
    if training.recompute_granularity == "full" and training.recompute_num_layers > config.model.num_layers:
        yield Problem(
            "training.recompute_num_layers",
            training.recompute_num_layers,
            f"must be at most the {config.model.num_layers} layers of the model.",
        )


def _world(config: RunConfig, world_size: int) -> Iterator[Problem]:
    parallel, training = config.parallel, config.training
    mp = parallel.model_parallel_size
    if world_size % mp:
        fix = f"must be divisible by TP x PP x CP = {mp}; change --nproc / the nodes, or the layout."
        yield Problem("ranks", world_size, fix)
        return
    expert = parallel.expert_tensor_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    if config.model.is_moe and world_size % expert:
        fix = f"must be divisible by ETP x EP x PP = {expert}; change --nproc / the nodes, or the layout."
        yield Problem("ranks", world_size, fix)
    dp = world_size // mp
    step = training.micro_batch_size * dp
    if (batch := training.global_batch_size) % step:
        sizes = f"{step} (micro-batch {training.micro_batch_size}, data parallel {dp})"
        fix = f"must be divisible by micro_batch_size x data-parallel size = {sizes}; {_nearest_multiples(batch, step)}"
        yield Problem("training.global_batch_size", batch, fix)
    pp = parallel.pipeline_model_parallel_size
    if parallel.virtual_stages > 1 and training.global_batch_size % (step * pp):
        yield Problem(
            "training.global_batch_size",
            training.global_batch_size,
            f"with the interleaved schedule, the number of micro-batches must be divisible by the pipeline size {pp}; "
            + _nearest_multiples(training.global_batch_size, step * pp),
        )
    yield from _rampup(config, step)


def _rampup(config: RunConfig, step: int) -> Iterator[Problem]:
    ramp, target = config.training.rampup_batch_size, config.training.global_batch_size
    if ramp is None:
        return
    if len(ramp) != 3:
        yield Problem("training.rampup_batch_size", list(ramp), "must be [start, increment, samples].")
        return
    start, increment, _ = ramp
    if start > target:
        yield Problem(
            "training.rampup_batch_size", start, f"start must be at most training.global_batch_size = {target}."
        )
    elif (target - start) % increment:
        yield Problem(
            "training.rampup_batch_size",
            list(ramp),
            f"global_batch_size - start = {target} - {start} must be divisible by the increment {increment}.",
        )
    for name, size in (("start", start), ("increment", increment)):
        yield from _indivisible(
            f"training.rampup_batch_size {name}",
            size,
            step,
            "micro_batch_size x data-parallel size",
            "every batch of the ramp must be a whole number of micro-batches on each rank.",
        )
