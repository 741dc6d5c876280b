"""The section ``objective`` of a configuration: what a model is trained for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_qwen.config.fields import setting


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model is trained for."""

    kind: Literal["pretrain", "sft", "dpo", "orpo"] = setting(
        "pretrain",
        doc="pretrain: cross-entropy of the next token; sft: of what the assistant wrote in whole conversations "
        "(`mq data prepare --chat`); dpo, orpo: preferences between two answers (`mq data prepare --pairs`), against "
        "the model at the start or, with orpo (arXiv 2403.07691), without a reference.",
    )
    average: Literal["token", "sequence", "sample"] = setting(
        "token",
        doc="With sft, what counts the same in the global batch: tokens with loss, sequences (conversations), or "
        "samples (packed rows).",
    )
    dpo_loss: Literal["sigmoid", "hinge", "ipo", "robust"] = setting(
        "sigmoid",
        doc="With dpo, the loss of the margin between the rewards of a pair: sigmoid (arXiv 2305.18290), hinge (SLiC, "
        "arXiv 2305.10425), ipo (arXiv 2310.12036, with log-probabilities averaged over an answer's tokens), or robust "
        "(arXiv 2403.00409).",
    )
    beta: float = setting(
        0.1,
        doc="With dpo, what log-probability ratios are multiplied by, with ipo its tau; with orpo, the weight of the "
        "loss of the odds ratio (lambda in the paper).",
        above=0.0,
    )
    label_smoothing: float = setting(
        0.0,
        doc="With dpo and sigmoid or robust, the probability that a pair is labelled the wrong way round.",
        minimum=0.0,
        below=0.5,
    )
    nll_coeff: float = setting(
        0.0,
        doc="With dpo, weight of the cross-entropy of the chosen answer, a mean over its tokens and then over pairs "
        "(arXiv 2404.19733).",
        minimum=0.0,
    )
    token_descriptions: Mapping[str, str] = setting(
        factory=dict,
        doc="With sft, control tokens whose rows begin as the mean of the rows of describing words, as "
        '{"<|im_end|>": "end of the turn"}: those that the model of checkpoint.load never trained. Of that model only '
        "the weights are then taken, without moments.",
    )

    @property
    def of_pairs(self) -> bool:
        """Whether its data are pairs of answers."""
        return self.kind in ("dpo", "orpo")
