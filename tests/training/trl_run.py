"""TRL's SFTTrainer over given ids and labels, in the order given; writes the loss of every step."""

import json
import sys
from pathlib import Path
from typing import Any


def main(spec: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    asked = json.loads(spec.read_text())
    losses: list[float] = []

    class Recording(SFTTrainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
    arguments = SFTConfig(
        output_dir=asked["out"],
        packing=False,
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
        loss_type="nll",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Recording(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(asked["rows"]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_file=asked["tokenizer"] + "/tokenizer.json", pad_token="<|endoftext|>", eos_token="<|im_end|>"
        ),
    )
    trainer.train()
    Path(asked["out"], "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
