#!/bin/sh
# examples/mpirun/run.sh [--section.field VALUE ...]; MPIRUN_ARGS go to mpirun: MPIRUN_ARGS="--hostfile hosts"
set -eu
# Split at spaces on purpose: several options.
exec mpirun -n "${RANKS:-2}" ${MPIRUN_ARGS:-} python pretrain_dept.py examples/mpirun/run.yaml "$@"
