#!/usr/bin/env bash
# tools/test.sh [pytest argument…]: setup, lint, format, types, tests. Runs every step; exit code 1 if any failed.
# By default pytest skips tests marked slow or gpu; tools/test.sh -m "slow or not slow" runs all but gpu.
#
# This is also the CI matrix. Without arguments, the default suite runs on the Python of .venv, and other_suite on the
# other supported version, in .venv-VERSION (4 to 7 GB), if this machine has it. The summary names what ran on which.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

kind=$(cut -d' ' -f1 .venv/setup.stamp 2>/dev/null || true)
tools/setup.sh "${kind:-cpu}" || exit
path=$PATH
export PATH=$PWD/.venv/bin:$path OMP_NUM_THREADS=1
notes=()
tools/install_slurm.sh || notes+=("skipped: tests on a real Slurm (it is not installed)")
tools/install_te.sh || notes+=("skipped: tests of Transformer Engine's Python (it could not be installed into .te)")

summary=()
status=0
step() { # step NAME COMMAND…
    local name=$1 started=$SECONDS verdict=passed
    shift
    echo "== $name"
    "$@" || { verdict=FAILED; status=1; }
    summary+=("$(printf '%-20s %-6s %4d s' "$name" "$verdict" $((SECONDS - started)))")
}
version=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
step lint ruff check .
step format ruff format --check .
step types mypy
step "tests, Python $version" pytest "$@"

# What differs between the two versions is the language, the standard library and the wheels. The unit tests cover the
# first two; one test of ranks and one of engines run Megatron-Core and vLLM as installed there: training, a push,
# generation. The other tests run the same code in processes that start slowly, and so on one version only.
other_suite=(
    tests/unit
    tests/distributed/test_actor.py::test_gradients_equal_transformers
    tests/rollout/test_node.py::test_greedy_output_and_logprobs_are_those_of_transformers_after_a_push
)
other=3.12
[ "$version" = 3.11 ] || other=3.11
if [ $# -gt 0 ]; then
    notes+=("not run: Python $other (only without arguments)")
elif tools/setup.sh cpu "$other"; then
    PATH=$PWD/.venv-$other/bin:$path step "tests, Python $other" pytest "${other_suite[@]}"
elif [ $? = 3 ]; then
    notes+=("not run: Python $other (no such interpreter on this machine)")
else
    notes+=("not run: Python $other (its environment could not be made, see above)")
fi
echo "== summary"
printf '%s\n' "${summary[@]}" "${notes[@]}"
exit $status
