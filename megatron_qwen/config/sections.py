"""The sections of a run configuration, as typed and documented dataclasses.

A field has megatron-core's name where megatron-core has one. The bounds of a single field are declared here;
legal combinations of fields are checked in ``checks.py``.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_qwen.config.fields import setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of the network, as in the released Qwen configurations."""

    num_layers: int = setting(doc="Transformer layers.", minimum=1)
    hidden_size: int = setting(doc="Width of the residual stream.", minimum=1)
    ffn_hidden_size: int = setting(doc="Intermediate size of the SwiGLU MLP of a dense layer.", minimum=1)
    num_attention_heads: int = setting(doc="Query heads.", minimum=1)
    num_query_groups: int = setting(doc="Key/value heads (grouped-query attention).", minimum=1)
    kv_channels: int | None = setting(None, doc="Head dimension; null is hidden_size / num_attention_heads.", minimum=2)
    vocab_size: int = setting(
        doc="Embedding rows of the exported model. A layout pads this to a multiple of 128 x TP; padded rows take no "
        "part in the loss and are removed at export.",
        minimum=1,
    )
    max_position_embeddings: int = setting(
        doc="Maximum sequence length, as declared in the exported config.json.", minimum=1
    )
    layernorm_epsilon: float = setting(1e-6, doc="RMSNorm epsilon.", above=0)
    add_qkv_bias: bool = setting(True, doc="Bias on Q, K and V (Qwen2 family).")
    qk_layernorm: bool = setting(False, doc="RMSNorm on every query and key head (Qwen3 family).")
    share_embeddings_and_output_weights: bool = setting(False, doc="One matrix for input embedding and output layer.")
    init_method_std: float = setting(
        0.02, doc="Standard deviation of the normal initialisation (released configs: initializer_range).", above=0
    )
    scale_output_init: bool = setting(
        True, doc="Divide the initialisation of the attention output and MLP output matrices by sqrt(2 x num_layers)."
    )
    hidden_dropout: float = setting(0.0, doc="Dropout after attention and MLP.", minimum=0, maximum=0.9)
    attention_dropout: float = setting(0.0, doc="Dropout of attention weights.", minimum=0, maximum=0.9)
    num_moe_experts: int | None = setting(None, doc="Routed experts of every layer; null is a dense model.", minimum=2)
    moe_router_topk: int = setting(2, doc="Experts that each token is routed to.", minimum=1)
    moe_ffn_hidden_size: int | None = setting(None, doc="Intermediate size of a routed expert.", minimum=1)
    moe_shared_expert_intermediate_size: int | None = setting(
        None, doc="Intermediate size of the shared expert; null is no shared expert.", minimum=1
    )
    moe_shared_expert_gate: bool = setting(False, doc="Sigmoid gate on the shared expert (Qwen2-MoE).")
    moe_router_pre_softmax: bool = setting(
        True,
        doc="true: softmax over all experts, then top-k (norm_topk_prob false in config.json); false: weights of the "
        "top-k experts are renormalised to sum to 1 (norm_topk_prob true).",
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = setting(
        "aux_loss",
        doc="Tokens over which the load-balancing loss is computed: micro-batch, sequence, global batch; none is off.",
    )
    moe_aux_loss_coeff: float = setting(0.001, doc="Weight of the load-balancing loss.", minimum=0)
    moe_router_force_load_balancing: bool = setting(
        False, doc="Route tokens to random experts, evenly: for benchmarks only, since the router does not learn."
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
class RopeConfig:
    """Rotary position embeddings (RoPE) of queries and keys."""

    # A kind that extends the context takes its other fields from here too, null by default. For YaRN:
    # original_max_position_embeddings, beta_fast, beta_slow, attention_factor, mscale; ``scaling`` is its factor.
    kind: Literal["default"] = setting("default", doc="default: channel pair i of d turns by position / base^(2i/d).")
    base: float = setting(1_000_000.0, doc="RoPE base (theta).", above=1)
    scaling: float = setting(1.0, doc="Factor that extends the context; 1 is none, and default requires 1.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout: how model and batch are split over ranks. Data-parallel size = ranks / (TP x PP x CP)."""

    tensor_model_parallel_size: int = setting(
        1, doc="Tensor-parallel size (TP): ranks that split each weight matrix.", minimum=1
    )
    sequence_parallel: bool = setting(
        False, doc="Sequence parallelism (SP): split norms and residual stream over the TP ranks."
    )
    pipeline_model_parallel_size: int = setting(
        1, doc="Pipeline-parallel size (PP): ranks that split the layers.", minimum=1
    )
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, doc="Model chunks per pipeline rank (interleaved schedule); null or 1 is plain 1F1B.", minimum=1
    )
    num_layers_in_first_pipeline_stage: int | None = setting(
        None, doc="Layers of the first pipeline rank; null is an even share.", minimum=1
    )
    num_layers_in_last_pipeline_stage: int | None = setting(
        None, doc="Layers of the last pipeline rank; null is an even share.", minimum=1
    )
    context_parallel_size: int = setting(
        1, doc="Context-parallel size (CP): ranks that split each sequence.", minimum=1
    )
    expert_model_parallel_size: int = setting(
        1, doc="Expert-parallel size (EP): ranks that split the experts.", minimum=1
    )
    expert_tensor_parallel_size: int | None = setting(
        None, doc="Tensor-parallel size of an expert (ETP); null is the TP size.", minimum=1
    )
    use_distributed_optimizer: bool = setting(True, doc="Shard the optimizer over the data-parallel ranks (ZeRO-1).")
    overlap_grad_reduce: bool | None = setting(
        None, doc="Overlap the gradient reduce-scatter with the backward pass; null is chosen by performance.preset."
    )
    overlap_param_gather: bool | None = setting(
        None, doc="Overlap the parameter all-gather with the forward pass; null is chosen by performance.preset."
    )
    overlap_p2p_comm: bool = setting(
        True, doc="Overlap pipeline communication with compute in the interleaved schedule (unbatched sends)."
    )
    distributed_timeout_minutes: int = setting(30, doc="Timeout of a collective operation, in minutes.", minimum=1)

    @property
    def model_parallel_size(self) -> int:
        """TP x PP x CP: ranks that together hold one replica of the dense parameters."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Tensor parallel size inside an expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def virtual_stages(self) -> int:
        """Model chunks on each pipeline rank; 1 without interleaving."""
        return self.virtual_pipeline_model_parallel_size or 1


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats, and the backend whose kernels compute in them."""

    backend: Literal["auto", "te", "torch"] = setting(
        "auto",
        doc="te: Transformer Engine modules; torch: plain torch modules, CPU and GPU; auto: te where it can run.",
    )
    dtype: Literal["bf16", "fp32"] = setting("bf16", doc="Compute format; bf16 keeps fp32 main weights.")
    fp8: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = setting(
        None,
        doc="FP8 recipe for the GEMMs of the layers; null is none. tensorwise suits Hopper; mxfp8 requires Blackwell.",
    )
    first_last_layers_bf16: bool = setting(
        True, doc="Keep the first and last layers in bf16; ignored with the recipe delayed."
    )
    num_layers_at_start_in_bf16: int = setting(1, doc="First layers kept in bf16.", minimum=0)
    num_layers_at_end_in_bf16: int = setting(1, doc="Last layers kept in bf16.", minimum=0)
    emulate_fp8: bool = setting(
        False,
        doc="Emulate FP8: round the operands of each GEMM to FP8 in plain torch, on any device. Slow; for studying the "
        "numerics of tensorwise and blockwise.",
    )
    grad_reduce_in_fp32: bool = setting(True, doc="Accumulate and reduce gradients in fp32.")
    use_precision_aware_optimizer: bool | None = setting(
        None,
        doc="Precision-aware optimizer: store only the 16 bits of each fp32 main weight that the bf16 weight lacks "
        "(exact; saves 2 bytes per parameter), and the moments in the formats below. Requires the te backend; null is "
        "chosen by performance.preset.",
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

    path: str | None = setting(None, doc="Path of a .bin / .idx pair without the extension, or of a set of shards.")
    blend: str | None = setting(
        None, doc="Blend file: sources, their weights and the stages of the run (docs/data.md); instead of data.path."
    )
    packing: Literal["windows", "best_fit"] | None = setting(
        None,
        doc="How samples are made of data.path: windows over the stream of documents, or whole documents packed by "
        "best fit, which do not attend to one another; null is windows with objective.kind=pretrain, else best_fit.",
    )
    tokenizer: str | None = setting(None, doc="Directory of the Hugging Face tokenizer that the tokens were made with.")
    seq_length: int = setting(4096, doc="Tokens per sample.", minimum=2)
    validation_fraction: float = setting(
        0.01, doc="Fraction of the documents held out for validation.", minimum=0, maximum=0.5
    )
    eod_mask_loss: bool = setting(False, doc="Mask the loss of the token that follows an end of document.")
    reset_attention_mask: bool = setting(
        False,
        doc="Treat the documents of a sample as packed sequences (THD): no attention across documents, and positions "
        "restart at 0 in each.",
    )
    loader: Literal["mmap", "dali"] = setting(
        "mmap",
        doc="Data loader: a thread over memory maps, or NVIDIA DALI (install the extra dali). Both give equal batches.",
    )
    prefetch_steps: int = setting(
        1, doc="Steps whose batches are prefetched during compute; 0 disables prefetching.", minimum=0, maximum=16
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, clipping and the learning-rate schedule."""

    learning_rate: float = setting(3e-4, doc="Peak learning rate.", above=0)
    min_learning_rate: float = setting(3e-5, doc="Learning rate at the end of the decay.", minimum=0)
    weight_decay: float = setting(0.1, doc="Decoupled weight decay; never on norms and biases.", minimum=0)
    adam_beta1: float = setting(0.9, doc="Decay of the first moment.", minimum=0, maximum=0.9999)
    adam_beta2: float = setting(0.95, doc="Decay of the second moment.", minimum=0, maximum=0.99999)
    adam_eps: float = setting(1e-8, doc="Epsilon in the denominator of the update.", above=0)
    clip_grad: float = setting(1.0, doc="Maximum global gradient norm; 0 is no clipping.", minimum=0)
    lr_decay_style: Literal["cosine", "wsd", "linear", "constant"] = setting(
        "cosine", doc="Learning-rate schedule after warm-up; wsd is warmup-stable-decay."
    )
    lr_warmup_iters: int = setting(0, doc="Iterations of linear warm-up.", minimum=0)
    lr_decay_iters: int | None = setting(None, doc="Iteration at which the decay ends; null is train_iters.", minimum=1)
    lr_wsd_decay_iters: int | None = setting(
        None, doc="Iterations of the final decay of wsd; null is a tenth of the run.", minimum=1
    )
    lr_wsd_decay_style: Literal["linear", "cosine", "minus_sqrt"] = setting(
        "minus_sqrt", doc="Shape of the final decay of wsd (minus_sqrt: 1 - sqrt, Haegele et al. 2024)."
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batches, length of the run, validation, recompute."""

    train_iters: int = setting(1000, doc="Optimizer steps of the whole run.", minimum=1)
    micro_batch_size: int = setting(1, doc="Sequences per micro-batch of a data-parallel rank.", minimum=1)
    global_batch_size: int = setting(8, doc="Sequences per optimizer step, over all ranks.", minimum=1)
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
        doc="Activation recompute in the backward pass: none, selective (recompute_modules) or full layers; null is "
        "chosen by performance.preset.",
    )
    recompute_method: Literal["uniform", "block"] = setting(
        "uniform",
        doc="Layers that full recompute covers: uniform is all, in units of recompute_num_layers; block is the first "
        "recompute_num_layers of each pipeline chunk.",
    )
    recompute_num_layers: int = setting(
        1, doc="Layers per recomputed unit (uniform), or recomputed layers per chunk (block).", minimum=1
    )
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe", "moe_act", "layernorm", "shared_experts"], ...] = (
        setting(("core_attn",), doc="Modules that selective recompute covers.")
    )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics are written. metrics.jsonl is always written, one line per step."""

    log_interval: int = setting(
        1, doc="Iterations between progress lines; the live line of a terminal shows every iteration.", minimum=1
    )
    tensorboard: bool = setting(True, doc="Write event files under tensorboard/.")
    wandb_project: str | None = setting(None, doc="Weights & Biases project; null is off.")
    profile_start: int | None = setting(None, doc="First iteration of a torch profiler window; null is off.", minimum=1)
    profile_iters: int = setting(3, doc="Iterations of the profiler window.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class PerformanceConfig:
    """Options that change speed or memory, not what is computed; the preset chooses those that are null."""

    preset: Literal["auto", "none"] = setting(
        "auto",
        doc="auto: enables what hardware, backend and layout allow, for the null fields of this section and for fields "
        "of other sections that name this preset, and logs each choice; none: leaves null fields off.",
    )
    threads_per_rank: int | None = setting(
        None,
        doc="CPU threads per rank; null divides the cores among the local ranks. Bit-exact resumes need the same.",
        minimum=1,
    )
    cross_entropy_chunk_tokens: int | None = setting(
        None,
        doc="Tokens per chunk of logits in the loss; null is 4096 on a GPU, and 64 MiB of logits on a CPU.",
        minimum=1,
    )
    fused_kernels: bool | None = setting(
        None, doc="Fused kernels of Transformer Engine for RoPE, activation, dropout and token permutation; te backend."
    )
    compile: bool | None = setting(
        None,
        doc="torch.compile for the memory-bound operations of the torch backend (norm, activation, RoPE, loss), and on "
        "a CPU for the transposes of weight-gradient GEMMs; compilation takes some seconds. Bit-exact resumes need the "
        "same value.",
    )
    tp_comm_overlap: bool | None = setting(
        None, doc="Overlap tensor-parallel communication with GEMMs; requires the te backend and sequence parallelism."
    )
    moe_token_dispatcher: Literal["allgather", "alltoall", "deepep", "hybridep"] | None = setting(
        None, doc="Communication that sends tokens to their experts; deepep and hybridep require the package deep_ep."
    )
    moe_shared_expert_overlap: bool | None = setting(
        None, doc="Overlap the shared expert with the token dispatch to routed experts."
    )
    moe_grouped_gemm: bool | None = setting(None, doc="Grouped GEMM: compute all experts of a rank in one operation.")
    cuda_graph_impl: Literal["none", "local"] | None = setting(
        None,
        doc="CUDA graphs per layer: capture the kernels once and replay them; helps where kernel launches limit speed.",
    )
    fp8_param_gather: bool | None = setting(
        None, doc="Store and all-gather the weights of FP8 layers in FP8; requires the te backend and precision.fp8."
    )
    cpu_offloading_num_layers: int | None = setting(
        None,
        doc="Layers whose activations are offloaded to host memory until the backward pass; te backend.",
        minimum=0,
    )
    optimizer_offload_fraction: float | None = setting(
        None,
        doc="Fraction of the optimizer state that is stored and updated on the host; te backend.",
        minimum=0,
        maximum=1,
    )
    garbage_collection_interval: int | None = setting(
        None,
        doc="Steps between Python garbage collections, which all ranks run at the same step; 0 leaves them to Python.",
        minimum=0,
    )
