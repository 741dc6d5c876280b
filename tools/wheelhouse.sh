#!/usr/bin/env bash
# Makes, on a machine without a GPU, the wheels that an air-gapped GPU node lacks to run this project:
# megatron-core, Transformer Engine with its torch binding built for the node's torch and CUDA, and what they need.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

usage() {
    cat <<'EOF'
usage: tools/wheelhouse.sh --torch 2.11.0 --output DIR [options]

  --python PATH     interpreter of the node's version (python3.12)
  --torch VERSION   torch of the node
  --cuda VERSION    CUDA toolkit that builds the binding; of torch's major version (that of nvcc on PATH)
  --have FILE       what the node has already: the output of `pip list --format=freeze` there
  --arch N          keep device code of one compute capability, such as 90 for H100 and H200: a tenth of the size
  --split SIZE      cut wheels above SIZE (such as 60M) into parts, with checksums and a script that joins them
  --output DIR      where the wheels go

examples:
  tools/wheelhouse.sh --torch 2.11.0 --output wheels
  tools/wheelhouse.sh --torch 2.11.0 --have node.txt --arch 90 --split 60M --output wheels
  on the node: bash wheels/install.sh
EOF
}

die() {
    echo "wheelhouse: $*" >&2
    exit 2
}

python=python3.12 torch='' cuda='' have=/dev/null arch='' split='' output=''
while [ $# -gt 0 ]; do
    case $1 in
    --python | --torch | --cuda | --have | --arch | --split | --output)
        [ $# -gt 1 ] || die "$1 needs a value."
        declare "${1#--}=$2"
        shift 2
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) die "$1 is not an option; see --help." ;;
    esac
done
[ -n "$torch" ] || die "--torch must name the node's torch, such as 2.11.0."
[ -n "$output" ] || die "--output must name a folder."
command -v "$python" >/dev/null || die "--python $python is not there; give the node's version of Python."
nvcc=$(command -v nvcc || true)
[ -n "$nvcc" ] || die "nvcc is not on PATH; the binding needs the CUDA toolkit (no GPU)."
found=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
[ -z "$cuda" ] || [ "$cuda" = "$found" ] || die "--cuda $cuda, but nvcc is of CUDA $found."
# The compiler on PATH may be a link or a script elsewhere; it knows where its toolkit is.
toolkit=$("$nvcc" -dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
toolkit=$(readlink -f "${toolkit:-/usr/local/cuda}")
[ -d "$toolkit/include" ] || die "the toolkit of $nvcc is not found (looked in $toolkit)."
[ "$have" = /dev/null ] || [ -r "$have" ] || die "--have $have cannot be read."

mkdir -p "$output"
output=$(readlink -f "$output")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { echo "wheelhouse: $*"; }

say "an environment with torch $torch"
"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check -q)
"${pip[@]}" install "torch==$torch" setuptools wheel packaging pybind11 ninja numpy
"$work/venv/bin/python" -m pip list --format=freeze 2>/dev/null | sed 's/==.*//' >"$work/with_torch"
built_for=$("$work/venv/bin/python" -c 'import torch; print(torch.version.cuda)')
[ "${built_for%%.*}" = "${found%%.*}" ] || die "torch $torch is built for CUDA $built_for, nvcc is of $found."

say "wheels of the project's requirements"
echo "torch==$torch" >"$work/constraints"
"${pip[@]}" install --report "$work/report.json" --dry-run --ignore-installed -c "$work/constraints" \
    --no-binary transformer-engine-torch --no-build-isolation "$here/..[gpu]" 2>"$work/resolve.log" ||
    { tail -20 "$work/resolve.log" >&2; die "the requirements cannot be resolved with torch $torch."; }
"$work/venv/bin/python" - "$work/report.json" "$work/with_torch" "$have" >"$work/wanted" <<'EOF'
import json
import re
import sys

report, with_torch, have = sys.argv[1:]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


there = {plain(line) for line in open(with_torch)} | {plain(line.split("==")[0]) for line in open(have)}
for item in json.load(open(report))["install"]:
    name, version = item["metadata"]["name"], item["metadata"]["version"]
    if plain(name) not in there | {"megatron-qwen", "transformer-engine-torch"}:
        print(f"{name}=={version}")
    if plain(name) == "transformer-engine-torch":
        print(f"{name}=={version}", file=open(f"{report}.binding", "w"))
EOF
"${pip[@]}" download --no-deps -d "$output" -r "$work/wanted"

if [ -s "$work/report.json.binding" ]; then
    binding=$(cat "$work/report.json.binding")
    say "$binding, compiled by nvcc $found (seventeen processor minutes)"
    core=$(ls "$output"/transformer_engine_cu*.whl)
    "${pip[@]}" install --no-deps "$core" "$output"/transformer_engine-*.whl
    packages=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
    CPATH=$(find "$packages" -maxdepth 2 -name include -type d | paste -sd:) NVTE_FRAMEWORK=pytorch \
        CUDA_HOME="$toolkit" PATH="$work/venv/bin:$PATH" \
        "${pip[@]}" wheel --no-build-isolation --no-deps --no-binary transformer-engine-torch -w "$output" "$binding"
    if [ -n "$arch" ]; then
        PYTHONPATH="$here/.." "$work/venv/bin/python" -m tools.fat_binary "$core" --keep "$arch" --output "$work/cut"
        mv "$work/cut/$(basename "$core")" "$core"
    fi
fi

cd "$output"
rm -f -- *.part_* install.sh
sha256sum -- *.whl >SHA256SUMS
if [ -n "$split" ]; then
    find . -maxdepth 1 -name '*.whl' -size "+${split}" -print0 | while IFS= read -r -d '' wheel; do
        split -b "$split" -d -a 3 "$wheel" "$wheel.part_"
        rm -- "$wheel"
    done
fi
cat >install.sh <<'EOF'
#!/usr/bin/env bash
# Joins what was split, checks every wheel, installs them into the python3 on PATH (or $PYTHON).
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
for first in *.whl.part_000; do
    if [ -e "$first" ]; then cat "${first%000}"[0-9][0-9][0-9] >"${first%.part_000}"; fi
done
sha256sum --check --quiet SHA256SUMS
"${PYTHON:-python3}" -m pip install --no-index --no-deps ./*.whl
EOF
say "$(find . -maxdepth 1 -name '*.whl*' | wc -l) files, $(du -sh . | cut -f1), in $output; on the node: bash install.sh"
