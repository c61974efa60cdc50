#!/usr/bin/env bash
# tools/setup.sh cpu|gpu [3.11|3.12]: makes .venv with all packages of requirements-KIND.lock and this one, editable.
# Returns at once if it is up to date; installs again when a requirement or the package's metadata has changed.
# PYTHON=/path/to/python3.12 selects the interpreter (default: the first 3.11 or 3.12 found). With a version, the
# environment is .venv-VERSION and its interpreter is of that version; exit code 3 if this machine has none.
# gpu: tools/check_node.sh first lists what this node lacks.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:-}
version=${2:-}
case $kind,$version in
cpu, | gpu, | cpu,3.11 | gpu,3.11 | cpu,3.12 | gpu,3.12) ;;
*) echo "usage: tools/setup.sh cpu|gpu [3.11|3.12]" >&2; exit 2 ;;
esac
venv=.venv${version:+-$version}
stamp=$venv/setup.stamp
lock=requirements-$kind.lock
wanted="$kind $(cat "$lock" pyproject.toml tools/setup.sh | sha256sum | cut -d' ' -f1) $PWD"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "setup: $venv is ready ($kind)"
    exit 0
fi

find_python() {
    local candidate candidates=(${PYTHON:+"$PYTHON"} python3.11 python3.12 python3)
    # pyenv's python3.12 on the path fails unless that version is activated; the installed one is below its root.
    candidates+=("${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[12].*/bin/python3)
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1].split())' \
            "${version:-3.11 3.12}" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    if [ -n "$version" ]; then
        echo "setup: no Python $version found; install it or set PYTHON=/path/to/python$version" >&2
        exit 3
    fi
    echo "setup: error: no Python 3.11 or 3.12 found; install one or set PYTHON=/path/to/python3.12" >&2
    exit 2
}

pip_install() { # without a terminal: one line per package instead of progress bars
    local pip=("$venv/bin/python" -m pip install --no-deps --no-compile --disable-pip-version-check)
    if [ -t 1 ]; then
        "${pip[@]}" "$@"
    else
        "${pip[@]}" --progress-bar off "$@" | sed -un 's/^\(Collecting [^ ]*\).*/\1/p; s/^Installing .*/unpacking/p'
    fi
}

build_jobs() { # number of concurrent compilers, at 2 GB of memory each
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
is_available() { # is_available PIP-ARGUMENT…: the configured package sources have it for this interpreter
    "$venv/bin/python" -m pip install --quiet --dry-run --no-deps --retries 0 "$@" >/dev/null 2>&1
}
if [ "$kind" = gpu ] || is_available "$torch"; then
    pip_install "$torch"
elif pytorch=(--extra-index-url https://download.pytorch.org/whl/cpu) && is_available "${pytorch[@]}" "$torch"; then
    pip_install "${pytorch[@]}" "$torch"
else
    # The GPU build of the same release computes the same on the CPU, but its import needs the CUDA libraries (3 GB).
    echo "setup: $torch cannot be downloaded here: installing the GPU build of that release"
    libraries="cublas|cuda-(cupti|nvrtc|runtime)|cudnn-cu|cufft|cufile|curand|cusolver|cusparse|nccl|nvjitlink"
    libraries+="|nvshmem|nvtx"
    pip_install -r <(grep -E "^(torch==|nvidia-($libraries))" requirements-gpu.lock)
fi
# Transformer Engine's torch extension is built, or fetched, against the torch and the wheels installed here: those
# contain the headers of CUDA, cuDNN and NCCL, and ninja. No CUDA toolkit is needed.
pip_install -r <(grep -Ev '^(torch|transformer-engine-torch)==' "$lock")
if [ "$kind" = gpu ]; then
    echo "setup: transformer-engine-torch: downloading its prebuilt wheel, or else compiling it (minutes)"
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
