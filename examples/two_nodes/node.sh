#!/bin/sh
# One node, started on it by hand, without ssh: examples/two_nodes/node.sh NODE_RANK [--section.field VALUE ...]
set -eu
node_rank=$1
shift
exec deepspeed --hostfile "${HOSTFILE:-examples/two_nodes/hostfile}" --no_ssh --node_rank "$node_rank" \
    --master_addr "${MASTER_ADDR:-node1}" --master_port "${MASTER_PORT:-29500}" \
    pretrain_dept.py examples/two_nodes/run.yaml "$@"
