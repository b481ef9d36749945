#!/usr/bin/env bash
# The gateways of deploy/gateways before two local nodes, one of them killed amid streams; gateways.py says
# what has to hold. Needs Rust and python3 with venv; packages go to $CLIENTS/gateways (target/clients).
set -euo pipefail
cd "$(dirname "$0")/../../.."
clients=$(realpath -m "${CLIENTS:-target/clients}")
if [ ! -f "$clients/gateways/ready" ]; then
    python3 -c 'import ensurepip' 2>/dev/null || { apt-get update -qq; apt-get install -y -qq python3-venv; }
    python3 -m venv "$clients/gateways"
    "$clients/gateways/bin/pip" install -q --disable-pip-version-check smg==1.13.0 vllm-router==0.1.17
    touch "$clients/gateways/ready"
fi
# The same packages as in clients.sh and browser.sh: other ones would build their libraries anew.
cargo build --locked -q --release -p cli -p server --bin kilotok --example scripted
scripted=${CARGO_TARGET_DIR:-target}/release/examples/scripted
port=${PORT:-18550}
export PATH=$clients/gateways/bin:$PATH
trial=crates/server/conformance/gateways.py
python3 $trial SMG "$scripted" "$port" deploy/gateways/smg.sh
python3 $trial vllm-router "$scripted" $((port + 10)) deploy/gateways/vllm-router.sh
