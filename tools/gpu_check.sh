#!/usr/bin/env bash
# tools/gpu_check.sh [part…] [--wheels DIR] [--json FILE] [--device cpu] [--size tiny]: what only a GPU can show, on one
# GPU, without network. One table at the end. See tools/gpu_check.sh --help.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

# The first interpreter that has PyTorch; --help, --download and a table of what is missing need none.
python=
for candidate in ${PYTHON:+"$PYTHON"} "$root/.venv/bin/python" python3 python; do
    command -v "$candidate" >/dev/null || continue
    python=${python:-$candidate}
    if "$candidate" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo "gpu_check: error: no Python found; set PYTHON=/path/to/python" >&2; exit 2; }
# Keep the working directory, to which paths in arguments are relative, but import nothing from it.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
exec "$python" -m tools.gpu_check "$@"
