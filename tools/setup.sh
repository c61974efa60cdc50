#!/usr/bin/env bash
# tools/setup.sh cpu|gpu: makes .venv with everything that requirements-KIND.lock names and this package, editable.
# Succeeds at once if that is already there; installs again when a requirement or the package's metadata changed.
# PYTHON=/path/to/python3.12 chooses the interpreter. gpu: tools/check_node.sh says first what this node lacks.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:-}
if [ "$kind" != cpu ] && [ "$kind" != gpu ]; then
    echo "usage: tools/setup.sh cpu|gpu" >&2
    exit 2
fi
venv=.venv
stamp=$venv/setup.stamp
lock=requirements-$kind.lock
wanted="$kind $(cat "$lock" pyproject.toml tools/setup.sh | sha256sum | cut -d' ' -f1) $PWD"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "setup: $venv is ready ($kind)"
    exit 0
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: error: no Python 3.11 or 3.12 found; install one or set PYTHON=/path/to/python3.12" >&2
    exit 2
}

pip_install() { # long output becomes one line a package where nobody watches a progress bar
    local pip=("$venv/bin/python" -m pip install --no-deps --no-compile --disable-pip-version-check)
    if [ -t 1 ]; then
        "${pip[@]}" "$@"
    else
        "${pip[@]}" --progress-bar off "$@" | sed -un 's/^\(Collecting [^ ]*\).*/\1/p; s/^Installing .*/unpacking/p'
    fi
}

build_jobs() { # compilers at a time: one takes up to 2 GB
    local free_gb jobs
    free_gb=$(($(awk '/^MemAvailable/ { print $2 }' /proc/meminfo) / 1000000))
    jobs=$((free_gb / 2 < $(nproc) ? free_gb / 2 : $(nproc)))
    echo $((jobs > 1 ? jobs : 1))
}

exec 9>.venv.lock
flock --wait 1800 9 || { echo "setup: error: another tools/setup.sh has held .venv.lock for 30 minutes" >&2; exit 2; }
started=$SECONDS
made_for=$(cut -d' ' -f1 "$stamp" 2>/dev/null || true)
python=$venv/bin/python
if [ "${made_for:-$kind}" != "$kind" ] || ! "$python" -c '' 2>/dev/null; then
    python=$(find_python)
fi
[ "$kind" = cpu ] || tools/check_node.sh "$python"
rm -f "$stamp"
if [ "$python" != "$venv/bin/python" ]; then
    echo "setup: making $venv${made_for:+, which was for $made_for,} with $("$python" --version)"
    "$python" -m venv --clear "$venv" || { echo "setup: error: $python -m venv failed; Debian: apt install python3-venv" >&2; exit 2; }
fi

echo "setup: installing $(grep -c == "$lock") pinned packages (minutes on the first call)"
torch=$(grep -o '^torch==[^ ]*' "$lock")
torch_source=()
if [ "$kind" = cpu ] && ! "$venv/bin/python" -m pip install --quiet --dry-run --no-deps "$torch" >/dev/null 2>&1; then
    torch_source=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi
pip_install "${torch_source[@]}" "$torch"
# Transformer Engine's torch extension is built, or fetched, against the torch and the wheels that are then installed:
# the headers of CUDA, cuDNN and NCCL lie in those, and so does ninja. No CUDA toolkit is needed.
pip_install -r <(grep -v '^transformer-engine-torch==' "$lock")
if [ "$kind" = gpu ]; then
    echo "setup: transformer-engine-torch: fetching its ready-made build, else compiling (minutes)"
    PATH=$PWD/$venv/bin:$PATH NVTE_BUILD_USE_NVIDIA_WHEELS=1 MAX_JOBS=${MAX_JOBS:-$(build_jobs)} \
        pip_install --no-build-isolation "$(grep -o '^transformer-engine-torch==[^ ]*' "$lock")"
else
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
fi
pip_install --quiet --no-build-isolation --editable .
"$venv/bin/vcppo" --help >/dev/null
echo "$wanted" >"$stamp.tmp"
mv "$stamp.tmp" "$stamp"
echo "setup: done in $((SECONDS - started)) s; next: tools/demo.sh, or source $venv/bin/activate and vcppo --help"
