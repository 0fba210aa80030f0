#!/bin/sh
# SageMaker names things its own way: translate, then start. It passes `serve` as an argument, which says nothing new.
set -eu

if [ -z "${HF_MODEL_ID:-}" ]; then
    echo "HF_MODEL_ID must name the model to serve." >&2
    exit 2
fi
export MODEL_ID="$HF_MODEL_ID"
export REVISION="${HF_MODEL_REVISION:-${REVISION:-}}"
export NUM_SHARD="${SM_NUM_GPUS:-${NUM_SHARD:-}}"
export QUANTIZE="${HF_MODEL_QUANTIZE:-${QUANTIZE:-}}"
export TRUST_REMOTE_CODE="${HF_MODEL_TRUST_REMOTE_CODE:-${TRUST_REMOTE_CODE:-}}"

exec text-generation-launcher --port 8080
