"""``mq data verify``: every byte against the manifest."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path


def main(options: argparse.Namespace) -> int:
    """Verifies."""
    from megatron_qwen.data.token_files.verify import verify

    def show(path: Path) -> None:
        if sys.stderr.isatty():
            print(f"reading {path}", file=sys.stderr)

    noted = verify(options.prefix, show)
    if options.json:
        print(json.dumps(asdict(noted), indent=2))
    else:
        shards = f" in {len(noted.shards)} shards" if noted.shards else ""
        print(f"{options.prefix}: {noted.documents:,} documents{shards}, {noted.tokens:,} tokens")
        print("every byte, count, id and the index match the manifest")
    return 0
