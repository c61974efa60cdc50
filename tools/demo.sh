#!/usr/bin/env bash
# tools/demo.sh: the main job on this machine, from setup to a better model that transformers loads. About five minutes.
#   tools/demo.sh            SFT → reward model → value pretraining → PPO → export → evaluation, as local processes
#   tools/demo.sh --sft      only SFT on TP 2 × PP 2 and the export, about two minutes
#   tools/demo.sh --slurm    the whole chain as real Slurm jobs on 3 virtual nodes (Debian or Ubuntu; root installs Slurm)
# Finished steps are skipped, so after an interruption the same command continues. It writes to VCPPO_DEMO_OUT (runs).
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-}
case $mode in
"" | --sft | --slurm) ;;
*) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
out=${VCPPO_DEMO_OUT:-runs}
recipe=vcppo
[ "$mode" = --sft ] && recipe=sft
run=$out/demo_$recipe
overrides=(run.dir="$run" model.hf="$out/demo_task/base_model" sft.train="$out/demo_task/sft_train.jsonl"
    sft.validation="$out/demo_task/sft_validation.jsonl" prompts.train="$out/demo_task/prompts_train.jsonl"
    prompts.test="$out/demo_task/prompts_test.jsonl")

tools/setup.sh cpu
export PATH=$PWD/.venv/bin:$PATH
[ -f "$out/demo_task/make_task.json" ] || vcppo make-task --out "$out/demo_task" --task running_sum
if [ "$mode" = --slurm ]; then
    tools/install_slurm.sh
    environment=$(tools/devcluster.sh up) # on a separate line: a failure ends the script
    eval "$environment"
    trap 'tools/devcluster.sh down' EXIT
    vcppo submit configs/demo/vcppo.yaml "${overrides[@]}" --cluster devcluster
    vcppo status "$run" --watch
else
    vcppo run "configs/demo/$recipe.yaml" "${overrides[@]}"
fi
vcppo report "$run"
python - "$run/export/hf" <<'EOF'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("3 #1 +4 #2 -9 #3 +5 ?", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=80, do_sample=False)
print(f"transformers loads {sys.argv[1]}; greedy answer to 3 +4 -9 +5 (modulo 10):")
print(" ", tokenizer.decode(answer[0]))
EOF
