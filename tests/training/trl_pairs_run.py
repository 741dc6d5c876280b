"""TRL's DPOTrainer or ORPOTrainer over pairs of ids, in the order given; writes loss and metrics of every step."""

import json
import sys
from pathlib import Path
from typing import Any

Steps = list[dict[str, float]]


def shared(asked: Any) -> dict[str, Any]:
    """Arguments of both trainers."""
    return {
        "output_dir": asked["out"],
        "beta": asked["beta"],
        "max_length": None,
        "per_device_train_batch_size": asked["batch"] // asked["accumulate"],
        "gradient_accumulation_steps": asked["accumulate"],
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": asked["rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "remove_unused_columns": False,
    }


def dpo(asked: Any, steps: Steps, model: Any, reference: Any, rows: Any, tokenizer: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    class Recording(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # ids already

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            steps.append({"loss": float(loss)} | {name: values[-1] for name, values in self._metrics["train"].items()})
            return loss

    nll = asked["nll_coeff"]
    arguments = DPOConfig(
        **shared(asked),
        loss_type=[asked["loss"], "sft"] if nll else [asked["loss"]],
        loss_weights=[1.0, nll] if nll else [1.0],
        label_smoothing=asked["label_smoothing"],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_log_probs=False,
        sync_ref_model=False,
    )
    return Recording(model=model, ref_model=reference, args=arguments, train_dataset=rows, processing_class=tokenizer)


def orpo(asked: Any, steps: Steps, model: Any, _reference: Any, rows: Any, tokenizer: Any) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class Recording(ORPOTrainer):  # type: ignore[misc]
        def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
            row = {"prompt_input_ids": feature["prompt_ids"], "prompt_attention_mask": [1] * len(feature["prompt_ids"])}
            for side in ("chosen", "rejected"):
                ids = feature["prompt_ids"] + feature[f"{side}_ids"]
                row |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
                row[f"{side}_labels"] = [-100] * len(feature["prompt_ids"]) + feature[f"{side}_ids"]
            return row

        def concatenated_forward(self, model: Any, batch: Any) -> Any:
            # TRL also trains the prompt, and takes the mean over the tokens of the batch; here it is over pairs.
            chosen, rejected, *logits, _nll = super().concatenated_forward(model, batch)
            return (chosen, rejected, *logits, -chosen.mean())

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            found = {name: values[-1] for name, values in self._stored_metrics["train"].items()}
            steps.append({"loss": float(loss)} | found)
            return loss

    arguments = ORPOConfig(**shared(asked), max_completion_length=None)
    return Recording(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def main(spec: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    asked = json.loads(spec.read_text())
    steps: Steps = []

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=asked["tokenizer"] + "/tokenizer.json", pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    make = {"dpo": dpo, "orpo": orpo}[asked["objective"]]
    make(asked, steps, model(), model(), Dataset.from_list(asked["rows"]), tokenizer).train()
    every = asked["accumulate"]
    groups = [steps[first : first + every] for first in range(0, len(steps), every)]
    whole = [{name: sum(one[name] for one in group) / every for name in group[0]} for group in groups]
    for one, group in zip(whole, groups, strict=True):
        one["loss"] = sum(step["loss"] for step in group)  # each is divided by their number already
    Path(asked["out"], "steps.json").write_text(json.dumps(whole))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
