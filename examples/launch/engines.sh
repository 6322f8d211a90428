#!/usr/bin/env bash
# Starts SGLang servers on all GPUs of this node, and ends when one of them does: examples/launch/engines.sh MODEL_FOLDER
#
#   ENGINE_TP      GPUs of one server (1)
#   GPUS_PER_NODE  (8)
#   ENGINE_PORT    of the first server; the next ones count up (30000)
#   ENGINE_KEY     required: the servers' control endpoints execute what they are sent. The trainer takes it as rollout.api_key
# The servers listen on all interfaces: keep their ports behind the cluster's firewall.
set -euo pipefail
model=${1:?give the folder of the HF model}
: "${ENGINE_KEY:?set a secret, the same for trainer and engines}"
tp=${ENGINE_TP:-1}
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 143' TERM INT
for ((first = 0, n = 0; first + tp <= ${GPUS_PER_NODE:-8}; first += tp, n++)); do
  python -m sglang.launch_server --model-path "$model" --dtype bfloat16 --tp-size "$tp" --base-gpu-id "$first" \
    --host 0.0.0.0 --port $((${ENGINE_PORT:-30000} + n)) --api-key "$ENGINE_KEY" --mem-fraction-static 0.85 &
done
wait -n
