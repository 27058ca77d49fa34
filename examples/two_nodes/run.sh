#!/bin/sh
# Both nodes from one of them, over ssh (pdsh): examples/two_nodes/run.sh [--section.field VALUE ...]
set -eu
exec deepspeed --hostfile "${HOSTFILE:-examples/two_nodes/hostfile}" \
    pretrain_dept.py examples/two_nodes/run.yaml "$@"
