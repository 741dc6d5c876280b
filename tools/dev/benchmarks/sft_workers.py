"""The two sides of ``mq bench sft``: a process each, told over stdin to fine-tune for a number of epochs.

Both train the model of ``mq bench train_step`` on the same conversations, ids and masks, and pack them by best fit.
"""

import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.core_patches.install import prepare_process
from tools.dev.benchmarks.train_step_workers import LEARNING_RATE, bench_config, peer_model
from tools.dev.benchmarks.turns import serve

SEQUENCE, BATCH = 1024, 4


def sft_config(prefix: str, micro: int = BATCH) -> RunConfig:
    """Fine-tuning on packed rows of 1,024 tokens, four a step."""
    config = bench_config("fp32", prefix)
    config = replace(config, data=replace(config.data, seq_length=SEQUENCE))
    config = config.with_section("training", micro_batch_size=micro, global_batch_size=BATCH)
    return config.with_section("objective", kind="sft")


def ours(prefix: str, micro: str) -> Callable[[], None]:
    """The call trains as many rows as an epoch has, in whole steps."""
    prepare_process()
    from megatron_qwen.distributed.rank import RankInfo, join
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.trainer import Trainer

    config, info = sft_config(prefix, int(micro)), RankInfo(0, 1, 0, 1, "127.0.0.1", 0)
    join(info, timeout_minutes=5)
    trainer = Trainer(build_components(config), [])
    steps = -(-rows_of_epoch(prefix) // BATCH)

    def epoch() -> None:
        for _ in range(steps):
            trainer.step()

    return epoch


def rows_of_epoch(prefix: str) -> int:
    """Packed rows of the first epoch, counted by the tokens that they hold."""
    from megatron_qwen.data.reading.training_data import TrainingData
    from megatron_qwen.data.token_files.token_set import TokenSet

    whole, reader, held, rows = TokenSet(prefix).num_tokens, TrainingData(sft_config(prefix)).at(0), 0, 0
    while held < whole:
        held += SEQUENCE - reader[rows].padding
        rows += 1
    return rows


def of_trl(prefix: str, packing: str) -> Callable[[], None]:
    """SFTTrainer, as TRL trains on a CPU: fused AdamW, sdpa; packed rows one at a time, as attention grows by squares.

    Args:
        prefix: token files whose conversations are handed over as ids and labels.
        packing: "bfd" for rows packed by best fit, "none" for batches of padded conversations of like length.
    """
    from transformers import PreTrainedTokenizerFast

    datasets: Any = importlib.import_module("datasets")
    trl: Any = importlib.import_module("trl")  # packages of the tests; their names have no types
    model = peer_model()
    rows = conversations(prefix)
    packed = packing == "bfd"
    # Some 500 tokens a conversation: as many of them a step as four packed rows hold.
    batch: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
    if not packed:
        whole = -(-sum(len(row["input_ids"]) for row in rows) // SEQUENCE // BATCH)
        batch = {"per_device_train_batch_size": len(rows) // whole, "gradient_accumulation_steps": 1}
        batch |= {"train_sampling_strategy": "group_by_length"}
    tokenizer = Path(prefix).with_name("tok") / "tokenizer.json"
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(Path(prefix).with_name(f"trl_{packing}")),
            packing=packed,
            packing_strategy="bfd",
            max_length=SEQUENCE,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            **batch,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), pad_token="<|endoftext|>"),
    )

    def epoch() -> None:
        sys.stdout = sys.stderr  # it reports there; the figures have stdout
        try:
            trainer.train()
        finally:
            sys.stdout = sys.__stdout__

    return epoch


def conversations(prefix: str) -> list[dict[str, Any]]:
    """Ids and labels of every conversation of a set."""
    import numpy as np

    from megatron_qwen.data.token_files.token_set import TokenSet

    tokens, rows = TokenSet(prefix), []
    mask = np.fromfile(f"{prefix}.mask", dtype=np.uint8)
    starts = [tokens.document_start(number) for number in range(tokens.num_documents)]
    for start, stop in itertools.pairwise([*starts, tokens.num_tokens]):
        ids = tokens.tokens(start, stop)
        rows.append({"input_ids": ids.tolist(), "labels": np.where(mask[start:stop] == 1, ids, -100).tolist()})
    return rows


if __name__ == "__main__":
    side, prefix_, kind, threads = sys.argv[1:]
    device.set_threads(int(threads))
    serve({"ours": ours, "trl": of_trl}[side](prefix_, kind))
