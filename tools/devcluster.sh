#!/bin/sh
# A real Slurm of virtual nodes on this machine: tools/devcluster.sh up|down|status [--nodes N] [--accounting]
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
python=$here/.venv/bin/python
[ -x "$python" ] || python=python3
cd "$here"
exec "$python" -m megatron_vcppo.slurm.devcluster "$@"
