#!/usr/bin/env bash
# Tests the chat page in headless Chromium and takes the pictures of docs/pictures:
#   crates/server/conformance/browser.sh [--pictures docs/pictures] [--timings]
# Needs Rust, node 18 or newer and npm; installs Chromium and the pinned packages where they are missing.
# The server is the scripted one: its speeds and its acceptance are simulated.
set -euo pipefail
cd "$(dirname "$0")/../../.."
command -v chromium >/dev/null || { apt-get update -qq; apt-get install -y -qq chromium; }
command -v npm >/dev/null || { apt-get update -qq; apt-get install -y -qq nodejs npm; }
here=crates/server/conformance
[ "${1:-}" = --pictures ] && mkdir -p "$2"
[ -d $here/node_modules/puppeteer-core ] || npm install --prefix $here --no-audit --no-fund --silent

target=${CARGO_TARGET_DIR:-target}/${PROFILE:-release}
flags=(); [ "${PROFILE:-release}" = release ] && flags=(--release)
cargo build --locked -q "${flags[@]}" -p cli -p server --bin kilotok --example scripted

work=$(mktemp -d)
servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true; rm -rf "$work"' EXIT
port=${PORT:-18510}
desk() { "$target/kilotok" admin --admission "$work/desk.db" "$@"; }
keys=()
for name in one two; do
    desk apply "$name" "$name@example.org" "test of the page" >/dev/null
    keys+=("$(desk approve "$name" | grep -oE "sk-[0-9a-f]+" | head -1)")
done

# About 3.6 bytes come of a step of 2.3 ms: 1,500 tokens/s and a little more.
"$target/examples/scripted" "$port" 2300 2>"$work/plain.log" & servers+=($!)
"$target/examples/scripted" $((port + 1)) 2300 "$work/desk.db" 2>"$work/seats.log" & servers+=($!)
for log in plain seats; do
    for _ in $(seq 100); do grep -q ready "$work/$log.log" && break; sleep 0.1; done
done
node $here/browser.mjs "http://127.0.0.1:$port" "http://127.0.0.1:$((port + 1))" "${keys[@]}" "$@"
