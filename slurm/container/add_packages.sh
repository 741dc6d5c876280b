#!/usr/bin/env bash
# Adds to an image the packages of pyproject.toml that it lacks. What the image's maker compiled for its CUDA stays:
# torch, Transformer Engine, NVIDIA's libraries and all that is built against them.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
# Of names as pip writes them, in lower case with dashes.
kept='^(torch.*|triton.*|pytorch-triton|transformer-engine.*|apex|flash-attn.*|nvidia-.*|cuda-.*|nvfuser.*)=='

[ $# -ge 1 ] || {
    echo "usage: add_packages.sh PYTHON [EXTRA...]; pyproject.toml and constraints.txt must be beside this script" >&2
    exit 2
}
python=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

installed() { "$python" -m pip list --disable-pip-version-check --format=freeze; }
compiled() { sed -E 's/^([^=]*)/\L\1/; :a; s/^([^=]*)[_.]/\1-/; ta' | grep -E "$kept" | sort; }

installed >"$work/image"
compiled <"$work/image" >"$work/kept" || true
grep -q '^torch==' "$work/kept" || {
    echo "add_packages.sh: $python has no torch; the image must bring it." >&2
    exit 1
}
"$python" - "$here" "$work" "$@" <<'PYTHON'
"""Writes the requirements, and constraints: what was compiled as it is, the rest as constraints.txt has it."""
import re
import sys
import tomllib
from pathlib import Path

here, work, extras = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
project = tomllib.loads((here / "pyproject.toml").read_text())["project"]
optional = project["optional-dependencies"]
if unknown := [name for name in extras if name not in optional]:
    sys.exit(f"add_packages.sh: {unknown[0]} is not an extra of pyproject.toml: {', '.join(optional)}.")
wanted = project["dependencies"] + [line for name in extras for line in optional[name]]
(work / "requirements").write_text("\n".join(wanted) + "\n")


def plain(line):
    return re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()


image = {plain(line) for line in (work / "image").read_text().splitlines()}
# A package that the image has may stay in its version: pip changes it only where pyproject.toml asks for a newer one.
pins = [line for line in (here / "constraints.txt").read_text().splitlines() if plain(line) not in image]
(work / "constraints").write_text((work / "kept").read_text() + "\n".join(pins) + "\n")
PYTHON

# NVIDIA's images set PIP_CONSTRAINT to pins of everything in them, also of what may change here.
PIP_CONSTRAINT='' PIP_BREAK_SYSTEM_PACKAGES=1 "$python" -m pip install --disable-pip-version-check --no-cache-dir \
    -r "$work/requirements" -c "$work/constraints"
installed | compiled >"$work/after" || true
if ! diff "$work/kept" <(grep -xFf "$work/kept" "$work/after"); then
    echo "add_packages.sh: the packages above were compiled for the image and have been replaced." >&2
    exit 1
fi
echo "added $(comm -13 <(sort "$work/image") <(installed | sort) | wc -l) packages; kept $(paste -sd' ' "$work/kept")"
