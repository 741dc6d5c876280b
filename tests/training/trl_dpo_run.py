"""TRL's DPOTrainer over given pairs of ids, in the order given; writes loss and rewards of every step."""

import json
import sys
from pathlib import Path
from typing import Any


def main(spec: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    asked = json.loads(spec.read_text())
    steps: list[dict[str, float]] = []

    class Recording(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # ids already

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            steps.append({"loss": float(loss)} | {name: values[-1] for name, values in self._metrics["train"].items()})
            return loss

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)

    arguments = DPOConfig(
        output_dir=asked["out"],
        loss_type=[asked["loss"]],
        beta=asked["beta"],
        label_smoothing=asked["label_smoothing"],
        max_length=None,
        per_device_train_batch_size=asked["batch"],
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=asked["rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_log_probs=False,
        sync_ref_model=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Recording(
        model=model(),
        ref_model=model(),
        args=arguments,
        train_dataset=Dataset.from_list(asked["rows"]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_file=asked["tokenizer"] + "/tokenizer.json", pad_token="<|endoftext|>", eos_token="<|im_end|>"
        ),
    )
    trainer.train()
    Path(asked["out"], "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
