#!/usr/bin/env bash
# Run inside an Ubuntu 24.04 image, as root, in the repository's folder: what both container recipes have in common.
set -euo pipefail
cd "$(dirname "$0")/../.."

export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
apt-get update
# At run time, too: g++ and Python.h (Triton and Megatron compile on first use), and the user part of InfiniBand, without
# which NCCL falls back to TCP. The driver's libraries come from the host.
apt-get install -y --no-install-recommends g++ python3.12-dev python3.12-venv libibverbs1 ibverbs-providers librdmacm1
rm -rf /var/lib/apt/lists/*
PYTHON=python3.12 tools/setup.sh gpu
# An image is read-only where it runs: modules that are not compiled now are compiled at every start.
.venv/bin/python -m compileall -q -j 0 .venv megatron_vcppo slurm || true # some packages carry templates that no Python takes
chmod -R a+rX .
