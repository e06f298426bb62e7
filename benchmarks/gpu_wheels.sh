#!/usr/bin/env bash
# Downloads the packages that benchmarks/gpu.sh needs and its machine lacks, as wheels for Python 3.12 on x86-64 Linux.
#
#   benchmarks/gpu_wheels.sh [DIR]        default .whl; PYTHON (default .venv/bin/python): its pip downloads
#
# Versions are those of requirements.lock where it names the package. mlflow and webdataset are not among them:
# `megabase train` with tracking.enabled=false imports neither. torch, triton, pytorch-lightning, transformers,
# pyarrow, matplotlib, rich, numpy, einops, pytest and their dependencies are on the machine.
set -eu
cd "$(dirname "$0")/.."

DIR=${1:-.whl}
PYTHON=${PYTHON:-.venv/bin/python}
LIMIT_MIB=64
WHEELS=(
    deepspeed hjson pydantic pydantic_core annotated-types typing-inspection  # DeepSpeed and what it needs
    typing_extensions omegaconf dnaio xopen isal zlib-ng backports.zstd nvidia-ml-py  # megabase
    reformer-pytorch axial_positional_embedding product_key_memory local-attention  # the peers
    CoLT5-attention hyper-connections torch-einops-utils performer-pytorch
)
PLATFORMS=()
for glibc in 39 35 34 31 28 27 24 17 12 5; do PLATFORMS+=(--platform "manylinux_2_${glibc}_x86_64"); done
PLATFORMS+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)

mkdir -p "$DIR"
for name in "${WHEELS[@]}"; do
    pinned=$(grep -iE "^${name//[-_]/[-_]}==" requirements.lock || echo "$name")
    # Packages published as source only are pure Python here, so the wheel works with any version.
    "$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${PLATFORMS[@]}" -d "$DIR" "$pinned" 2>/dev/null ||
        DS_BUILD_OPS=0 "$PYTHON" -m pip wheel -q --disable-pip-version-check --no-deps -w "$DIR" "$pinned"
done

# pip refuses to install two versions of one package.
twice=$(for wheel in "$DIR"/*.whl; do basename "$wheel" | cut -d- -f1; done | sort -f | uniq -di)
test -z "$twice" || { echo "several versions in $DIR of: $twice" >&2; exit 1; }
mib=$(du -sm "$DIR" | cut -f1)
echo "$DIR: $(ls "$DIR"/*.whl | wc -l) wheels, $mib MiB"
test "$mib" -le $LIMIT_MIB || { echo "more than $LIMIT_MIB MiB" >&2; exit 1; }
