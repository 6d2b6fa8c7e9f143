#!/usr/bin/env bash
# A run on GKE with TPUs through XPK: a JobSet, restarted by the cluster.
#
#   CLUSTER=my-cluster WORKLOAD=my-run TYPE=v5p-128 experiments/launch/xpk.sh \
#     --config=configs/tv_topk.py --workdir=/runs/tv_topk
#
# From the root of the repository, which XPK puts into the image. DRY_RUN=1
# prints the command instead. /runs is a storage of the cluster that is
# mounted by itself (`xpk storage attach ... --auto-mount=true`, README.md).
# https://github.com/AI-Hypercomputer/xpk
set -euo pipefail
# shellcheck source=experiments/launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

set_main "$@"
need CLUSTER 'of GKE, made by xpk cluster create'
need WORKLOAD 'name of the run'
need TYPE 'TPU type, for example v5p-128'
EXTRAS=${EXTRAS:-tpu,verifiers,hub}

# XPK restarts exit codes 42 and 127 to 255, so 143, but not 1 or 2
# (`xpk workload create --help`, --restart-on-exit-codes). exec: the signal must
# reach Python, not a shell.
act xpk workload create --cluster="$CLUSTER" --workload="$WORKLOAD" \
  --tpu-type="$TYPE" --num-slices=1 \
  --base-docker-image="${IMAGE:-python:3.12}" --script-dir=. \
  --max-restarts="${MAX_RESTARTS:-20}" \
  --termination-grace-period-seconds="${GRACE_SECONDS:-300}" \
  ${SPOT:+--spot} \
  --command="pip install -q '.[$EXTRAS]' && exec $(quoted "${main[@]}")"
