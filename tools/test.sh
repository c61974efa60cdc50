#!/usr/bin/env bash
# tools/test.sh [pytest argument…]: set-up, lint, format, types, tests; continues after a failure, exit code 1 if any.
# The default excludes what is marked slow or gpu; tools/test.sh -m "slow or not slow" runs all but gpu.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

kind=$(cut -d' ' -f1 .venv/setup.stamp 2>/dev/null || true)
tools/setup.sh "${kind:-cpu}" || exit
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=1
tools/install_slurm.sh && slurm="" || slurm="tests on a real Slurm were skipped: it is not installed"
tools/install_te.sh && te="" || te="tests of Transformer Engine's Python were skipped: it could not be put into .te"

summary=()
status=0
step() { # step NAME COMMAND…
    local name=$1 started=$SECONDS verdict=passed
    shift
    echo "== $name"
    "$@" || { verdict=FAILED; status=1; }
    summary+=("$(printf '%-8s %-6s %4d s' "$name" "$verdict" $((SECONDS - started)))")
}
step lint ruff check .
step format ruff format --check .
step types mypy
step tests pytest "$@"
echo "== summary"
printf '%s\n' "${summary[@]}" ${slurm:+"$slurm"} ${te:+"$te"}
exit $status
