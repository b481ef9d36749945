#!/bin/sh
# Every phase on a CPU: tiny.sh KILOTOK_TRAIN DIRECTORY
set -eu
train=$1 out=$2 recipe=$(dirname "$0")/tiny.toml
"$train" synthetic --out "$out"
set -- --recipe "$recipe" --corpus "$out/corpus"
"$train" sparsify "$@" --teacher "$out/dense" --out "$out/sparse"
"$train" qat "$@" --teacher "$out/dense" --student "$out/sparse/model" --out "$out/qat"
"$train" generate "$@" --model "$out/qat/model" --out "$out/answers"
"$train" draft "$@" --model "$out/qat/model" --answers "$out/answers/answers.bin" --out "$out/draft"
"$train" eval "$@" --model "$out/qat/model" --out "$out/eval"
