#!/usr/bin/env bash
# tools/demo.sh: the main job on this machine, from set-up to a model that transformers loads.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh cpu
export PATH=$PWD/.venv/bin:$PATH
vcppo config configs/demo/sft.yaml
