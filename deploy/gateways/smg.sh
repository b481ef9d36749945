#!/usr/bin/env bash
# SMG (pip install smg==1.13.0) in front of the servers given as arguments; requests with the same header
# X-SMG-Routing-Key go to the same server (`--policy cache_aware` finds prefixes by itself, and keeps all on
# one server while they begin alike).
#   deploy/gateways/smg.sh http://127.0.0.1:8001 http://127.0.0.1:8002
set -euo pipefail
exec smg launch --worker-urls "$@" --policy consistent_hashing --host 127.0.0.1 --port "${PORT:-8000}"
