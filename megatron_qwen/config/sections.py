"""The sections of a run configuration, as typed and documented dataclasses.

A field carries megatron-core's name where megatron-core has one. What a combination of fields may be is
checked in ``checks.py``; what one field may be is said here.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_qwen.config.fields import setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the network, in the terms of the released Qwen configurations."""

    num_layers: int = setting(doc="Transformer layers.", minimum=1)
    hidden_size: int = setting(doc="Width of the residual stream.", minimum=1)
    ffn_hidden_size: int = setting(doc="Width of the SwiGLU feed-forward of a dense layer.", minimum=1)
    num_attention_heads: int = setting(doc="Query heads.", minimum=1)
    num_query_groups: int = setting(doc="Key/value heads (grouped-query attention).", minimum=1)
    kv_channels: int | None = setting(None, doc="Head dimension; null is hidden_size / num_attention_heads.", minimum=2)
    vocab_size: int = setting(
        doc="Embedding rows of the exported model. Padding that a layout needs is added to this, takes no part "
        "in the loss and is cut at export.",
        minimum=1,
    )
    max_position_embeddings: int = setting(doc="Longest sequence the exported model declares.", minimum=1)
    rotary_base: float = setting(1_000_000.0, doc="RoPE base (theta).", above=1)
    layernorm_epsilon: float = setting(1e-6, doc="RMSNorm epsilon.", above=0)
    add_qkv_bias: bool = setting(True, doc="Bias on Q, K and V (Qwen2 family).")
    qk_layernorm: bool = setting(False, doc="RMSNorm on every query and key head (Qwen3 family).")
    share_embeddings_and_output_weights: bool = setting(False, doc="One matrix for input embedding and output layer.")
    init_method_std: float = setting(
        0.02, doc="Standard deviation of the normal initialisation (released configs: initializer_range).", above=0
    )
    scale_output_init: bool = setting(
        True, doc="Divide the initialisation of attention output and second feed-forward matrix by sqrt(2 x layers)."
    )
    hidden_dropout: float = setting(0.0, doc="Dropout after attention and feed-forward.", minimum=0, maximum=0.9)
    attention_dropout: float = setting(0.0, doc="Dropout of attention weights.", minimum=0, maximum=0.9)
    num_moe_experts: int | None = setting(None, doc="Routed experts of every layer; null is a dense model.", minimum=2)
    moe_router_topk: int = setting(2, doc="Experts that a token is sent to.", minimum=1)
    moe_ffn_hidden_size: int | None = setting(None, doc="Width of a routed expert.", minimum=1)
    moe_shared_expert_intermediate_size: int | None = setting(None, doc="Width of the shared expert.", minimum=1)
    moe_shared_expert_gate: bool = setting(False, doc="Sigmoid gate on the shared expert (Qwen2-MoE).")
    moe_router_pre_softmax: bool = setting(
        True,
        doc="true: the softmax over all experts weighs the chosen ones as it is (norm_topk_prob false); "
        "false: the weights of the chosen experts are renormalised to sum to one.",
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = setting(
        "aux_loss", doc="Over which tokens the load-balancing loss is taken."
    )
    moe_aux_loss_coeff: float = setting(0.001, doc="Weight of the load-balancing loss.", minimum=0)
    moe_router_force_load_balancing: bool = setting(
        False, doc="Send tokens to experts evenly and at random: for speed comparisons only, the model learns nothing."
    )
    moe_z_loss_coeff: float | None = setting(None, doc="Weight of the router z-loss; null is none.", minimum=0)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def is_moe(self) -> bool:
        """Whether the layers hold routed experts."""
        return self.num_moe_experts is not None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout: how the model and the batch are spread over ranks. Data parallelism is what is left over."""

    tensor_model_parallel_size: int = setting(1, doc="Ranks that share every matrix product (TP).", minimum=1)
    sequence_parallel: bool = setting(False, doc="Shard norms and residual stream over the TP ranks as well (SP).")
    pipeline_model_parallel_size: int = setting(1, doc="Ranks that share the layers (PP).", minimum=1)
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, doc="Model chunks a pipeline rank holds (interleaved schedule); null or 1 is plain 1F1B.", minimum=1
    )
    num_layers_in_first_pipeline_stage: int | None = setting(
        None, doc="Layers of the first pipeline rank; null is an even share.", minimum=1
    )
    num_layers_in_last_pipeline_stage: int | None = setting(
        None, doc="Layers of the last pipeline rank; null is an even share.", minimum=1
    )
    context_parallel_size: int = setting(1, doc="Ranks that share every sequence (CP).", minimum=1)
    expert_model_parallel_size: int = setting(1, doc="Ranks that share the experts (EP).", minimum=1)
    expert_tensor_parallel_size: int | None = setting(
        None, doc="TP inside an expert (ETP); null is the tensor parallel size.", minimum=1
    )
    use_distributed_optimizer: bool = setting(True, doc="Shard the optimizer over the data-parallel ranks (ZeRO-1).")
    overlap_grad_reduce: bool | None = setting(
        None, doc="Reduce gradients while the backward pass runs; null is chosen by performance.preset."
    )
    overlap_param_gather: bool | None = setting(
        None, doc="Gather parameters while the forward pass runs; null is chosen by performance.preset."
    )
    overlap_p2p_comm: bool = setting(
        True, doc="Overlap pipeline sends with compute in the interleaved schedule (and send unbatched)."
    )
    distributed_timeout_minutes: int = setting(30, doc="Longest wait inside one collective call.", minimum=1)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense part of the model for one sequence."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Tensor parallel size inside an expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def virtual_stages(self) -> int:
        """Model chunks on each pipeline rank."""
        return self.virtual_pipeline_model_parallel_size or 1


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats, and which kernels compute in them."""

    backend: Literal["auto", "te", "torch"] = setting(
        "auto",
        doc="te: Transformer Engine modules; torch: plain torch modules, CPU and GPU; auto: te where it can run.",
    )
    dtype: Literal["bf16", "fp32"] = setting("bf16", doc="Compute format; bf16 keeps fp32 main weights.")
    fp8: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = setting(
        None,
        doc="FP8 recipe of the layers' matrix products; null is none. tensorwise suits Hopper; mxfp8 needs Blackwell.",
    )
    first_last_layers_bf16: bool = setting(
        True, doc="Keep the first and last layers out of FP8; not with the recipe delayed."
    )
    num_layers_at_start_in_bf16: int = setting(1, doc="Layers kept out at the start.", minimum=0)
    num_layers_at_end_in_bf16: int = setting(1, doc="Layers kept out at the end.", minimum=0)
    emulate_fp8: bool = setting(
        False,
        doc="Round to FP8 in plain torch, on any device, instead of computing in it: slow, for studying the numerics "
        "of tensorwise and blockwise.",
    )
    grad_reduce_in_fp32: bool = setting(True, doc="Accumulate and reduce gradients in fp32.")
    use_precision_aware_optimizer: bool | None = setting(
        None,
        doc="Keep of the fp32 main weights only the 16 bits that the bf16 weights lack (exact, 2 bytes a parameter "
        "less), and the moments in the formats below; te backend. null is chosen by performance.preset.",
    )
    exp_avg_dtype: Literal["fp32", "bf16", "fp8"] = setting(
        "fp32", doc="Format of the first moment, with use_precision_aware_optimizer."
    )
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp8"] = setting(
        "fp32", doc="Format of the second moment, with use_precision_aware_optimizer."
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens are read and how samples are cut from them."""

    path: str | None = setting(None, doc="Prefix of a .bin / .idx pair (without the ending), or of a set of shards.")
    blend: str | None = setting(
        None, doc="Blend file: sources, their weights and the stages of the run (docs/data.md); instead of data.path."
    )
    tokenizer: str | None = setting(None, doc="Hugging Face tokenizer directory the tokens were made with.")
    seq_length: int = setting(4096, doc="Tokens of one sample.", minimum=2)
    validation_fraction: float = setting(
        0.01, doc="Share of the documents held out for validation.", minimum=0, maximum=0.5
    )
    eod_mask_loss: bool = setting(False, doc="Take no loss on the token that follows an end of document.")
    reset_attention_mask: bool = setting(
        False, doc="Documents do not attend to one another, and positions begin anew in each."
    )
    loader: Literal["mmap", "dali"] = setting(
        "mmap",
        doc="What reads ahead: a thread over memory maps, or NVIDIA DALI (the extra dali). Both give equal batches.",
    )
    prefetch_steps: int = setting(
        1, doc="Steps whose batches are read while an earlier one computes; 0 reads none ahead.", minimum=0, maximum=16
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, clipping and the learning-rate schedule."""

    learning_rate: float = setting(3e-4, doc="Peak learning rate.", above=0)
    min_learning_rate: float = setting(3e-5, doc="Learning rate at the end of the decay.", minimum=0)
    weight_decay: float = setting(0.1, doc="Decoupled weight decay; never on norms and biases.", minimum=0)
    adam_beta1: float = setting(0.9, doc="Decay of the first moment.", minimum=0, maximum=0.9999)
    adam_beta2: float = setting(0.95, doc="Decay of the second moment.", minimum=0, maximum=0.99999)
    adam_eps: float = setting(1e-8, doc="Term that keeps the division finite.", above=0)
    clip_grad: float = setting(1.0, doc="Largest global gradient norm; 0 is no clipping.", minimum=0)
    lr_decay_style: Literal["cosine", "wsd", "linear", "constant"] = setting(
        "cosine", doc="Schedule after warm-up; wsd is warm-up, stable, decay."
    )
    lr_warmup_iters: int = setting(0, doc="Iterations of linear warm-up.", minimum=0)
    lr_decay_iters: int | None = setting(None, doc="Iteration at which the decay ends; null is train_iters.", minimum=1)
    lr_wsd_decay_iters: int | None = setting(
        None, doc="Length of the final decay of wsd; null is a tenth of the run.", minimum=1
    )
    lr_wsd_decay_style: Literal["linear", "cosine", "minus_sqrt"] = setting(
        "minus_sqrt", doc="Shape of the final decay of wsd (minus_sqrt: 1 - sqrt, Haegele et al. 2024)."
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batches, length of the run, validation, recompute."""

    train_iters: int = setting(1000, doc="Optimizer steps of the whole run.", minimum=1)
    micro_batch_size: int = setting(1, doc="Sequences that one rank computes at once.", minimum=1)
    global_batch_size: int = setting(8, doc="Sequences of one optimizer step, over all ranks.", minimum=1)
    rampup_batch_size: tuple[int, ...] | None = setting(
        None,
        doc="[start, increment, samples]: the batch grows from start to global_batch_size over that many samples.",
        minimum=1,
    )
    seed: int = setting(1234, doc="Seed of initialisation, sample order and dropout.", minimum=0)
    eval_interval: int = setting(100, doc="Iterations between validations; 0 is none before the end.", minimum=0)
    eval_iters: int = setting(10, doc="Batches of a validation; 0 is no validation.", minimum=0)
    recompute_granularity: Literal["none", "selective", "full"] | None = setting(
        None,
        doc="What the backward pass computes again: nothing, selective (recompute_modules) or full layers; null is "
        "chosen by performance.preset.",
    )
    recompute_method: Literal["uniform", "block"] = setting("uniform", doc="Which layers full recompute takes.")
    recompute_num_layers: int = setting(
        1, doc="Layers of a recomputed unit (uniform) or recomputed layers (block).", minimum=1
    )
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe", "moe_act", "layernorm", "shared_experts"], ...] = (
        setting(("core_attn",), doc="Modules that selective recompute takes.")
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, how they are trusted."""

    save_interval: int = setting(500, doc="Iterations between checkpoints; 0 saves at the end only.", minimum=0)
    async_save: bool = setting(False, doc="Write while training goes on; the step waits for a copy in memory only.")
    keep_last: int = setting(3, doc="Newest checkpoints that are kept.", minimum=1)
    keep_every: int | None = setting(
        None, doc="Checkpoints at multiples of this many iterations are kept for good.", minimum=1
    )
    save_at: tuple[int, ...] = setting(
        (), doc="Further iterations after which a checkpoint is written; these are kept for good."
    )
    branch_from: str | None = setting(
        None,
        doc="Checkpoint of another run to go on from where the run directory has none: weights, optimizer, iteration, "
        "place in the data and generators. Schedule and length are this run's.",
    )
    load: str | None = setting(
        None, doc="Checkpoint to start from where the run directory has none: weights and optimizer, at iteration 0."
    )
    strict: bool = setting(
        False, doc="Refuse to start where the newest checkpoint is damaged, instead of an older one."
    )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is written where. metrics.jsonl is always written, a line a step."""

    log_interval: int = setting(
        1, doc="Iterations between progress lines; a terminal's live line shows every one.", minimum=1
    )
    tensorboard: bool = setting(True, doc="Write event files under tensorboard/.")
    wandb_project: str | None = setting(None, doc="Weights & Biases project; null is off.")
    profile_start: int | None = setting(None, doc="First iteration of a torch profiler window; null is off.", minimum=1)
    profile_iters: int = setting(3, doc="Iterations of the profiler window.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    """When a run gives up."""

    max_consecutive_skips: int = setting(
        5, doc="Steps in a row whose loss or gradient is not finite before the run stops with exit 17.", minimum=1
    )
    max_restarts_without_progress: int = setting(
        3, doc="Restarts in a row that leave no newer checkpoint, after which a job starts the run no more.", minimum=1
    )
    hang_timeout_s: float = setting(
        900.0,
        doc="Seconds without a finished step after which a job takes the run for hung: it dumps all stacks and starts "
        "again. Longer than the longest step, validation or save.",
        above=0,
    )
    startup_timeout_s: float = setting(
        1800.0, doc="The same before the first step: imports, joining, loading, compilation.", above=0
    )


@dataclass(frozen=True, kw_only=True)
class PerformanceConfig:
    """Choices that change speed or memory, not what is computed; the preset makes those that are null."""

    preset: Literal["auto", "none"] = setting(
        "auto",
        doc="auto: turns on what the hardware, the backend and the layout allow, here and in the fields of other "
        "sections that name this preset, and logs each choice; none: leaves off whatever is not asked for.",
    )
    threads_per_rank: int | None = setting(
        None,
        doc="CPU threads of a rank; null shares the cores among the local ranks. Part of bit-exact resumes.",
        minimum=1,
    )
    cross_entropy_chunk_tokens: int | None = setting(
        None, doc="Tokens whose logits exist at once in the loss; null is 4096, on a CPU what takes 64 MiB.", minimum=1
    )
    fused_kernels: bool | None = setting(
        None, doc="Transformer Engine's kernels for RoPE, activation, dropout and token permutation."
    )
    compile: bool | None = setting(
        None,
        doc="One kernel for each small operation of the torch backend, by torch.compile, and on a CPU for the copies "
        "of faster weight gradients; some seconds at the start. Part of bit-exact resumes.",
    )
    tp_comm_overlap: bool | None = setting(
        None, doc="Overlap tensor-parallel messages with the products they belong to; te backend, sequence parallelism."
    )
    moe_token_dispatcher: Literal["allgather", "alltoall", "deepep", "hybridep"] | None = setting(
        None, doc="How tokens travel to their experts; deepep and hybridep need the package deep_ep."
    )
    moe_shared_expert_overlap: bool | None = setting(
        None, doc="Compute the shared expert while tokens travel to the routed ones."
    )
    moe_grouped_gemm: bool | None = setting(None, doc="All experts of a rank in one product.")
    cuda_graph_impl: Literal["none", "local"] | None = setting(
        None, doc="Record each layer's kernels once and replay them; saves a host that launches too slowly."
    )
    fp8_param_gather: bool | None = setting(
        None, doc="Hold and gather the weights of FP8 layers in FP8; te backend, with precision.fp8."
    )
    cpu_offloading_num_layers: int | None = setting(
        None, doc="Layers whose activations wait in the host's memory for the backward pass; te backend.", minimum=0
    )
    optimizer_offload_fraction: float | None = setting(
        None, doc="Share of the optimizer's state that is kept and updated on the host.", minimum=0, maximum=1
    )
    garbage_collection_interval: int | None = setting(
        None,
        doc="Steps between Python's garbage collections, which all ranks then do together; 0 leaves it to Python.",
        minimum=0,
    )
