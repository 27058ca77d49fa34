#!/bin/sh
# One site: examples/two_sites/site.sh a|b [--section.field VALUE ...]
# RANKS: ranks of this site (1); MASTER_PORT: where they meet among themselves, another one for each site of a host.
set -eu
site=$1
shift
exec deepspeed --num_accelerators "${RANKS:-1}" --master_port "${MASTER_PORT:-29500}" \
    pretrain_dept.py "examples/two_sites/site_$site.yaml" "$@"
