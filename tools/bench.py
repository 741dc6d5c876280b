"""``mq bench``: runs a benchmark and its peer in one go and prints the ratio."""

import json
from collections.abc import Sequence

from megatron_qwen.cli import Parser, run_program


def main(arguments: Sequence[str]) -> int:
    """Prints a table, exit 1 where a required ratio is missed."""
    parser = Parser(
        "mq bench",
        description="Times this project against a peer, both in one run, and prints the ratio.",
        examples=["mq bench train_step", "mq bench train_step --rounds 9 --json"],
    )
    parser.add_argument(
        "name", choices=["train_step"], help="train_step: a training step against transformers + fused AdamW"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side that count (7)")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn (4)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    from tools.benchmarks import train_step

    rows = train_step.run(rounds=options.rounds, steps=options.steps)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(
                f"{row['benchmark']}: {row['ours_tokens_per_second']:,.0f} tokens/s against "
                f"{row['peer_tokens_per_second']:,.0f} ({row['peer']}), ratio {row['ratio']:.3f} "
                f"({row['ratio_min']:.3f} to {row['ratio_max']:.3f}), required {row['required']:.2f}"
            )
    return 0 if all(row["ratio"] >= row["required"] for row in rows) else 1


if __name__ == "__main__":
    run_program(main)
