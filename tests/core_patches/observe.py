"""What a process sees that has not been prepared, or that has: python -m tests.core_patches.observe plain|prepared

Each test file here may have a function ``observe(prepared)``. One process runs them all and prints their answers as
JSON, so that a test costs no process of its own.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or the name of what it raises."""
    try:
        return action()
    except Exception as error:
        return type(error).__name__


def main(state: str) -> None:
    """Prints what every test file observes, by name of the file."""
    prepared = state == "prepared"
    from megatron_qwen.core_patches.install import prepare_process

    if prepared:
        prepare_process()
        prepare_process()
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.core_patches.{path.stem}")
        if hasattr(module, "observe"):
            found[path.stem] = module.observe(prepared)
    dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
