#!/usr/bin/env bash
# The trainer's tests on a CPU. Installs libtorch (PyPI torch 2.11.0) unless LIBTORCH names one.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -z "${LIBTORCH:-}" ]; then
    venv=${KILOTOK_TORCH_VENV:-target/torch}
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.11.0
    LIBTORCH=$("$venv/bin/python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
fi
export LIBTORCH LIBTORCH_CXX11_ABI=1 OMP_NUM_THREADS=1
export LD_LIBRARY_PATH=$LIBTORCH/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
cargo fmt -p kilotok-train --check
cargo clippy --release -p kilotok-train --all-targets -- -D warnings
cargo test --release -p kilotok-train
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo build --release -p kilotok-train
sh recipes/tiny.sh "${CARGO_TARGET_DIR:-target}/release/kilotok-train" "$out"
