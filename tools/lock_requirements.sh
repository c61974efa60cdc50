#!/usr/bin/env bash
# Writes requirements-cpu.lock and requirements-gpu.lock: the pins and all packages that they require, for Python 3.11 and 3.12.
# The resolver (uv) reads metadata only, so this also verifies, on any machine, that the GPU pins fit together.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    echo "uv is not installed: using a temporary copy"
    python3 -m venv "$scratch/venv"
    "$scratch/venv/bin/pip" install --quiet uv
    uv=$scratch/venv/bin/uv
fi

lock() { # lock KIND [uv option…]
    local kind=$1
    shift
    echo "resolving requirements-$kind.txt and requirements-dev.txt"
    "$uv" pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header "$@" \
        requirements-"$kind".txt requirements-dev.txt --output-file "$kind.lock.tmp"
    {
        echo "# Made by tools/lock_requirements.sh from requirements-$kind.txt and requirements-dev.txt."
        cat "$kind.lock.tmp"
    } >requirements-"$kind".lock
    rm "$kind.lock.tmp"
    echo "requirements-$kind.lock: $(grep -c == requirements-"$kind".lock) packages"
}

# Text only: vLLM's CPU build requires these three, and torchvision breaks its import without image libraries.
no_media=(--no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec)
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    cpu_torch=(--find-links "$PIP_FIND_LINKS")
else
    cpu_torch=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi
lock cpu "${no_media[@]}" "${cpu_torch[@]}"
lock gpu

# Everything but transformer-engine-torch is a wheel that installs on the oldest supported system; check_node.sh names it.
glibc=$(sed -n 's/^glibc_needed=\([0-9.]*\).*/\1/p' tools/check_node.sh)
for python in 3.11 3.12; do
    "$uv" pip install --quiet --dry-run --no-deps --only-binary :all: --target "$scratch/target" --python-version "$python" \
        --python-platform "x86_64-manylinux_${glibc//./_}" -r <(grep -v '^transformer-engine-torch==' requirements-gpu.lock)
done
echo "requirements-gpu.lock: installs on glibc $glibc"
