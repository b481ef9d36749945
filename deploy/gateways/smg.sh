#!/usr/bin/env bash
# SMG (pip install smg==1.13.0) in front of the servers given as arguments, with session affinity.
#   deploy/gateways/smg.sh http://127.0.0.1:8001 http://127.0.0.1:8002
set -euo pipefail
exec smg launch --worker-urls "$@" --policy cache_aware --host 127.0.0.1 --port 8000
