#!/usr/bin/env bash
# tools/check_node.sh [PYTHON]: checks what a GPU node needs for tools/setup.sh gpu, before it downloads anything, and for jobs.
# Prints one line per failed check, with what to do, and one line with what was found. Exit code 2 if a check failed.
# tools/setup.sh gpu runs it; on compute nodes, which also compile (Triton, Megatron's fusions), run it yourself.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

glibc_needed=2.31  # llguidance's wheel; tools/lock_requirements.sh verifies it for the whole lock
gxx_oldest=11      # PyTorch's headers are C++20
gxx_newest=16      # crt/host_config.h of the lock's nvidia-cuda-crt
disk_needed_gb=16  # measured: the environment 9, and the wheels 5 while pip unpacks them
python=${1:-${PYTHON:-python3}}
found=()
failed=0

fail() { # fail NAME WHAT: WHAT TO DO
    echo "setup: error: $1: $2" >&2
    failed=1
}

at_least() { # at_least VERSION NEEDED
    [ "$(printf '%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

check_platform() {
    local platform
    platform="$(uname -s) $(uname -m)"
    if [ "$platform" != "Linux x86_64" ]; then
        fail platform "$platform; the GPU packages are pinned for Linux x86_64: use such a node"
    fi
    found+=("$platform")
}

check_glibc() {
    local version
    version=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)
    if [ -z "$version" ]; then
        fail glibc "none (a musl system?); glibc $glibc_needed or newer is needed: use tools/containers"
    elif ! at_least "$version" "$glibc_needed"; then
        fail glibc "$version is older than $glibc_needed (Ubuntu 20.04, RHEL 9): use a newer system or tools/containers"
    fi
    found+=("glibc ${version:-none}")
}

check_driver() { # a login node has none: a note, not a failure
    local cuda needed version
    cuda=$(sed -n 's/^nvidia-cuda-runtime==\([0-9]*\)\..*/\1/p' requirements-gpu.lock | head -n 1)
    case $cuda in
    12) needed=525 ;;
    13) needed=580 ;;
    *) fail driver "requirements-gpu.lock has CUDA '$cuda', whose driver tools/check_node.sh does not know: add it"; return ;;
    esac
    version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -E '^[0-9.]+$' | sort -V | head -n 1)
    if [ -z "$version" ]; then
        found+=("no NVIDIA driver here: compute nodes need $needed or newer for CUDA $cuda")
        return
    fi
    if ! at_least "$version" "$needed"; then
        fail driver "$version is too old for CUDA $cuda: $needed or newer is needed: have the driver updated"
    fi
    found+=("driver $version")
}

check_compiler() {
    local compiler=${CXX:-g++} version
    if ! version=$("$compiler" -dumpfullversion -dumpversion 2>/dev/null); then
        fail compiler "no $compiler: install g++ $gxx_oldest to $gxx_newest or set CXX (Debian, Ubuntu: apt install g++)"
    elif ! at_least "$version" "$gxx_oldest" || at_least "$version" $((gxx_newest + 1)); then
        fail compiler "$compiler is $version; PyTorch and CUDA take $gxx_oldest to $gxx_newest: install one and set CXX"
    fi
    found+=("$compiler ${version:-none}")
}

check_python_headers() {
    local include
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)
    if [ -z "$include" ]; then
        fail Python "'$python' is no Python interpreter: give the path of Python 3.11 or 3.12, or set PYTHON"
    elif [ ! -f "$include/Python.h" ]; then
        fail "Python headers" "no $include/Python.h: install python3-dev (RHEL: python3.12-devel) or set PYTHON"
    fi
    found+=("Python headers of $python")
}

check_disk() {
    local free_gb
    free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1000000))
    if [ ! -e .venv/setup.stamp ] && [ "$free_gb" -lt "$disk_needed_gb" ]; then
        fail disk "$free_gb GB free in $PWD; $disk_needed_gb GB are needed: free some, or use another file system"
    fi
    found+=("$free_gb GB free")
}

check_platform
check_glibc
check_driver
check_compiler
check_python_headers
check_disk
printf -v line '%s, ' "${found[@]}"
echo "setup: node: ${line%, }"
[ "$failed" = 0 ] || exit 2
