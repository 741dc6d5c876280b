"""``mq data merge``: several token files as one."""

import argparse
import json
from dataclasses import asdict


def main(options: argparse.Namespace) -> int:
    """Merges."""
    from megatron_qwen.data.token_files.merge import merge

    made = merge(options.prefixes, options.output, single=options.single)
    if options.json:
        print(json.dumps(asdict(made), indent=2))
    else:
        how = f"linked as {len(made.shards)} shards" if made.shards else "written as one"
        print(f"{options.output}: {made.documents:,} documents, {made.tokens:,} tokens, {how}")
    return 0
