#!/usr/bin/env bash
# Puts Transformer Engine's Python package (its pure wheel) into .te/, for the tests that run it on CPU over
# tests/helpers/te. Packages that it imports and .venv lacks go there too; versions are those of requirements-gpu.lock.
# Nothing is installed into .venv. Exit code 3: the packages cannot be downloaded here; the caller then skips those tests.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(transformer-engine onnx onnx-ir onnxscript ml-dtypes)
pinned=()
for package in "${packages[@]}"; do
    pinned+=("$(grep "^$package==" requirements-gpu.lock | cut -d' ' -f1)")
done
wanted="${pinned[*]} $(.venv/bin/python -V)"
[ "$(cat .te/installed 2>/dev/null)" != "$wanted" ] || exit 0

new=.te.new.$$
trap 'rm -rf "$new"' EXIT
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$new" "${pinned[@]}" || {
    echo "install_te: could not install ${pinned[*]}" >&2
    exit 3
}
echo "$wanted" >"$new/installed"
rm -rf .te
mv "$new" .te
