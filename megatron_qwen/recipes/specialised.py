"""Math, code and long reasoning: continued pretraining of Qwen2.5 with another mixture, and what follows it.

What is published:

- Qwen2.5-Coder (arXiv 2409.12186): six sizes from the base models; 5.2T tokens of single files at 8,192 tokens, with
  next-token prediction and fill-in-the-middle in the order prefix, suffix, middle; then 300B tokens of repositories at
  32,768 tokens and a RoPE base of 1,000,000; 70 % code, 20 % text, 10 % math. The mixture is a blend
  (docs/fine_tuning.md has it as a file); the share of documents for fill-in-the-middle is not published.
- Qwen2.5-Math (arXiv 2409.12122): 1.5B, 7B and 72B; more than 1T tokens at a context of 4,096.
- QwQ-32B: outcome rewards on math and code; of a start by supervised fine-tuning nothing is published.

Not published, and chosen by hand: learning rates (those of ``dense.py`` divided by three, as the weights are trained
already), batches (its tokens per step), the numbers of fine-tuning (those of ``instruct.py``). ``checkpoint.load`` must
name the base model; ``rope.base`` is that of a base after its first stage of pretraining.
"""

from dataclasses import replace

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import DataConfig, OptimConfig
from megatron_qwen.recipes import dense
from megatron_qwen.recipes.instruct import TP4, tuned

FILES, REPOSITORIES = 8192, 32_768
CODE_TOKENS, MATH_TOKENS = 5_500_000_000_000, 1_000_000_000_000
MATH_LENGTH = 4096


def _continued(base: RunConfig, name: str, *, length: int, positions: int, tokens: int) -> RunConfig:
    """Pretraining that goes on: as many tokens per step as the base's recipe has, in samples of another length."""
    size = base.training.global_batch_size * base.data.seq_length // length
    steps = tokens // (size * length)
    optim = base.optim
    rates = OptimConfig(
        learning_rate=round(optim.learning_rate / 3, 7),
        min_learning_rate=round((optim.min_learning_rate or 0.0) / 3, 7),
        lr_warmup_iters=optim.lr_warmup_iters,
    )
    return replace(
        base,
        recipe=name,
        model=replace(base.model, max_position_embeddings=positions),
        data=DataConfig(seq_length=length),
        optim=rates,
        training=replace(base.training, train_iters=steps, global_batch_size=size),
    )


def _coder(base: RunConfig) -> RunConfig:
    name = base.recipe.replace("qwen2_5_", "qwen2_5_coder_")
    return _continued(base, name, length=FILES, positions=REPOSITORIES, tokens=CODE_TOKENS)


def _math(base: RunConfig) -> RunConfig:
    name = base.recipe.replace("qwen2_5_", "qwen2_5_math_")
    return _continued(base, name, length=MATH_LENGTH, positions=MATH_LENGTH, tokens=MATH_TOKENS)


def _math_tuned(base: RunConfig) -> RunConfig:
    """Chains of thought and tool-integrated reasoning, in rows of the math models' 4,096 positions."""
    config = tuned(_math(base), positions=MATH_LENGTH)
    batch = replace(config.training, global_batch_size=512)  # the same number of tokens as instruct.py
    return replace(config, data=DataConfig(seq_length=MATH_LENGTH), rope=base.rope, training=batch)


def qwen2_5_coder_0_5b() -> RunConfig:
    """Qwen2.5-Coder-0.5B: continued pretraining on code from Qwen2.5-0.5B."""
    return _coder(dense.qwen2_5_0_5b())


def qwen2_5_coder_1_5b() -> RunConfig:
    """Qwen2.5-Coder-1.5B: continued pretraining on code from Qwen2.5-1.5B."""
    return _coder(dense.qwen2_5_1_5b())


def qwen2_5_coder_3b() -> RunConfig:
    """Qwen2.5-Coder-3B: continued pretraining on code from Qwen2.5-3B."""
    return _coder(dense.qwen2_5_3b())


def qwen2_5_coder_7b() -> RunConfig:
    """Qwen2.5-Coder-7B: continued pretraining on code from Qwen2.5-7B."""
    return _coder(dense.qwen2_5_7b())


def qwen2_5_coder_14b() -> RunConfig:
    """Qwen2.5-Coder-14B: continued pretraining on code from Qwen2.5-14B."""
    return _coder(dense.qwen2_5_14b())


def qwen2_5_coder_32b() -> RunConfig:
    """Qwen2.5-Coder-32B: continued pretraining on code from Qwen2.5-32B."""
    return _coder(dense.qwen2_5_32b())


def qwen2_5_coder_7b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-Coder-7B, by the numbers of Qwen2.5-7B."""
    return tuned(qwen2_5_coder_7b(), parallel=TP4)


def qwen2_5_coder_32b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-Coder-32B, by the numbers of Qwen2.5-32B."""
    return tuned(qwen2_5_coder_32b())


def qwen2_5_math_1_5b() -> RunConfig:
    """Qwen2.5-Math-1.5B: continued pretraining on mathematics from Qwen2.5-1.5B."""
    return _math(dense.qwen2_5_1_5b())


def qwen2_5_math_7b() -> RunConfig:
    """Qwen2.5-Math-7B: continued pretraining on mathematics from Qwen2.5-7B."""
    return _math(dense.qwen2_5_7b())


def qwen2_5_math_72b() -> RunConfig:
    """Qwen2.5-Math-72B: continued pretraining on mathematics from Qwen2.5-72B."""
    return _math(dense.qwen2_5_72b())


def qwen2_5_math_1_5b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-Math-1.5B on chains of thought and tool-integrated reasoning."""
    return _math_tuned(dense.qwen2_5_1_5b())


def qwen2_5_math_7b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-Math-7B on chains of thought and tool-integrated reasoning."""
    return _math_tuned(dense.qwen2_5_7b())


def qwen2_5_math_72b_instruct() -> RunConfig:
    """Fine-tuning of Qwen2.5-Math-72B on chains of thought and tool-integrated reasoning."""
    return _math_tuned(dense.qwen2_5_72b())


def qwq_32b_sft() -> RunConfig:
    """A start for QwQ-32B: fine-tuning of Qwen2.5-32B on long chains of thought, by the numbers of Qwen2.5-32B."""
    return replace(tuned(dense.qwen2_5_32b()), recipe="qwq_32b_sft")
