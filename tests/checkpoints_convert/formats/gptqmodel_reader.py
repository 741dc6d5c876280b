"""Reads GPTQ and AWQ directories with gptqmodel, in a process of its own: importing it takes seconds and changes torch.

``python -m tests.checkpoints_convert.formats.gptqmodel_reader OUT.safetensors (transformers|gptqmodel) DIRECTORY...``
saves the logits of each directory under its name.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def read(reader: str, directory: Path) -> Any:
    if reader == "transformers":
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    import gptqmodel

    return gptqmodel.GPTQModel.load(str(directory), backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=torch.float32)


def main(target: str, reader: str, *directories: str) -> None:
    torch._dynamo.config.disable = True  # gptqmodel compiles its kernels, which takes a minute and changes nothing
    found = {}
    for directory in map(Path, directories):
        model = read(reader, directory).eval()
        with torch.no_grad():
            found[directory.name] = model(torch.arange(5, 45)[None]).logits.float().contiguous()
    save_file(found, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
