#!/usr/bin/env bash
# vllm-router (pip install vllm-router==0.1.17) in front of the servers given as arguments; requests of a
# session (header x-session-id) go to the same server.
#   deploy/gateways/vllm-router.sh http://127.0.0.1:8001 http://127.0.0.1:8002
set -euo pipefail
exec vllm-router --worker-urls "$@" --policy consistent_hash --host 127.0.0.1 --port "${PORT:-8000}"
