#!/usr/bin/env bash
# Starts this node's part of a training run, engines included: examples/launch/train.sh CONFIG.yaml [section.key=value ...]
# The policy has the node's first four GPUs, rollout.engines the others. On one node that is all. On several, run it on each,
# with the same arguments and the environment that README.md, beside this file, explains.
set -euo pipefail
config=${1:?give a config.yaml}
shift
rendezvous=(--standalone)
network=()
if ((${NNODES:-1} > 1)); then
  : "${NODE_RANK:?set it to the number of this node, from 0}" "${MASTER_ADDR:?set it to the address of node 0}"
  : "${ENGINE_KEY:?set a secret, the same on every node}"
  rendezvous=(
    --nnodes "$NNODES" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}"
  )
  network=("sync.host=$MASTER_ADDR" rollout.host=0.0.0.0 "rollout.api_key=$ENGINE_KEY")
fi
# torchrun waits that long after SIGTERM, so that a checkpoint can be saved.
exec torchrun "${rendezvous[@]}" --nproc-per-node "${RANKS_PER_NODE:-4}" --shutdown-timeout 150 \
  -m megatron_gppo.train --config "$config" "${network[@]}" "$@"
