#!/usr/bin/env bash
# Starts this node's ranks of a training run: examples/launch/train.sh CONFIG.yaml [section.key=value ...]
#
# On one node that is all. On several, run it on each, with the same arguments and:
#   NNODES        nodes that train
#   NODE_RANK     this one, from 0
#   MASTER_ADDR   address of node 0 that the others, and the engines, reach
#   MASTER_PORT   a free port there (29500)
# and, where the defaults do not suit:
#   GPUS_PER_NODE       ranks on this node (8; set 4 where GPUs 4 to 7 are the engine's)
#   NCCL_SOCKET_IFNAME  interface of MASTER_ADDR, as GLOO_SOCKET_IFNAME, where a node has several: NCCL and gloo may choose one
#                       that leads nowhere
#   HF_HOME             cache of data sets and benchmarks; on nodes without internet, filled before, with HF_HUB_OFFLINE=1
# All nodes must see run.dir (checkpoints), the model's folder and the data under the same paths. The same command goes on from
# the newest checkpoint. torchrun waits 150 s after SIGTERM, so that a checkpoint can be saved.
set -euo pipefail
(($# >= 1)) || { sed -n '2,20s/^# \{0,1\}//p' "$0" >&2; exit 2; }
config=$1
shift
rendezvous=(--standalone)
host=()
if ((${NNODES:-1} > 1)); then
  : "${NODE_RANK:?set it to the number of this node, from 0}" "${MASTER_ADDR:?set it to the address of node 0}"
  rendezvous=(
    --nnodes "$NNODES" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}"
  )
  host=("sync.host=$MASTER_ADDR")
fi
exec torchrun "${rendezvous[@]}" --nproc-per-node "${GPUS_PER_NODE:-8}" --shutdown-timeout 150 \
  -m megatron_gppo.train --config "$config" "${host[@]}" "$@"
