#!/usr/bin/env bash
# Real clients against real servers on this machine:
#   crates/server/conformance/clients.sh         SDKs, wrappers, llm-comply, codex (in CI)
#   crates/server/conformance/clients.sh evals   and lm-eval, inspect-ai
#   crates/server/conformance/clients.sh all     and aiperf, guidellm (8 GB of packages)
# Needs Rust, python3 with venv, node 18 or newer with npm; packages go to $CLIENTS (target/clients).
# The model is the one that ships, greedy, under a name for which llm-comply runs its tests of reasoning
# too; codex asks the scripted server, because its instructions are longer than that model's context.
set -euo pipefail
cd "$(dirname "$0")/../../.."
kind=${1:-light}
here=crates/server/conformance
clients=$(realpath -m "${CLIENTS:-target/clients}")
target=${CARGO_TARGET_DIR:-target}/release
port=${PORT:-18530}
url=http://127.0.0.1:$port
model=kilotok-mini-o1-claude-4

need() { # need PROGRAM PACKAGES...
    command -v "$1" >/dev/null || { apt-get update -qq; apt-get install -y -qq "${@:2}"; }
}
environment() { # environment NAME REQUIREMENTS...: a Python environment, made once
    [ -f "$clients/$1/ready" ] && return
    python3 -m venv "$clients/$1"
    "$clients/$1/bin/pip" install -q --disable-pip-version-check "${@:2}"
    touch "$clients/$1/ready"
}
need npm nodejs npm
python3 -c "import ensurepip" 2>/dev/null || { apt-get update -qq; apt-get install -y -qq python3-venv; }
mkdir -p "$clients"
environment light -r $here/requirements.txt
[ -d $here/node_modules/openai ] || npm install --prefix $here --no-audit --no-fund --silent
cargo build --locked -q --release -p cli -p server --bin kilotok --example scripted

work=$(mktemp -d)
servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true; rm -rf "$work"' EXIT
mkdir "$work/model"
ln -s "$PWD"/models/kilotok-mini/* "$work/model/"
rm "$work/model/generation_config.json"
sed 's/"temperature": *[0-9.]*/"temperature": 0.0/' models/kilotok-mini/generation_config.json \
    >"$work/model/generation_config.json"
"$target/kilotok" serve -m "$work/model" --served-model-name $model --port "$port" 2>"$work/model.log" & servers+=($!)
"$target/examples/scripted" $((port + 1)) 300 2>"$work/scripted.log" & servers+=($!)
for log in model scripted; do
    for _ in $(seq 600); do grep -q ready "$work/$log.log" && break; sleep 0.1; done
    grep -q ready "$work/$log.log" || { cat "$work/$log.log"; exit 1; }
done

"$clients/light/bin/python" $here/clients.py "$url"
"$clients/light/bin/python" $here/wrappers.py "$url" $model
node $here/clients.mjs "$url" $model
"$clients/light/bin/python" $here/comply.py "$clients/light/bin/llm-comply" "$url" $model

mkdir "$work/codex" "$work/empty"
provider="{name=\"kilotok\",base_url=\"http://127.0.0.1:$((port + 1))/v1\",wire_api=\"responses\"}"
codex=$PWD/$here/node_modules/.bin/codex
(cd "$work/empty" && CODEX_HOME=$work/codex timeout 120 "$codex" exec --skip-git-repo-check -s read-only \
    -c model_provider=kilotok -c model=scripted -c "model_providers.kilotok=$provider" "Say hello" \
    </dev/null >"$work/codex.log" 2>&1) || { tail -20 "$work/codex.log"; exit 1; }
grep -q 'a \*\*scripted\*\* answer' "$work/codex.log"
echo "ok   codex exec: one turn over /v1/responses, simulated text"
[ "$kind" = light ] && exit

environment evals -r $here/requirements-evals.txt
asked="model=$model,base_url=$url/v1/completions,tokenizer_backend=remote,num_concurrent=2"
(cd $here/evals && HF_DATASETS_CACHE=$work/sets "$clients/evals/bin/lm_eval" run --model local-completions \
    --model_args "$asked" --tasks kilotok_facts_choice,kilotok_facts_generate --include_path .) | tee "$work/eval"
[ "$(grep -cE '^\|kilotok_facts' "$work/eval")" = 2 ]
export KILOTOK_BASE_URL=$url/v1 KILOTOK_API_KEY=none
"$clients/evals/bin/inspect" eval $here/evals/capitals.py --model "openai-api/kilotok/$model" \
    --temperature 0 --max-tokens 32 --display plain --log-dir "$work/inspect" | tee "$work/capitals"
grep -qE '^accuracy +[0-9]' "$work/capitals"
[ "$kind" = evals ] && exit

environment aiperf aiperf==0.13.0
environment guidellm guidellm==0.8.1
unset HF_HUB_OFFLINE
"$clients/aiperf/bin/aiperf" profile --model $model --url "$url" --endpoint-type completions --streaming \
    --tokenizer "$PWD/models/kilotok-mini" --concurrency 1 --request-count 8 \
    --synthetic-input-tokens-mean 64 --output-tokens-mean 48 --extra-inputs include_metrics:true \
    --extra-inputs draft_tokens:3 --extra-inputs ignore_eos:true --ui-type none --artifact-dir "$work/aiperf" |
    tee "$work/table"
grep -q 'Spec Decode' "$work/table"
"$clients/guidellm/bin/guidellm" run --backend "kind=openai_http,target=$url,model=$model" \
    --tokenizer "kind=huggingface_auto,model=$PWD/models/kilotok-mini" \
    --data kind=synthetic_text,prompt_tokens=64,output_tokens=32 --profile kind=concurrent,streams=2 \
    --constraint kind=max_requests,count=8 --disable-console-interactive \
    --output "kind=json,path=$work/guidellm.json"
echo "ok   all"
