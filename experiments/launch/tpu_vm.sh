#!/usr/bin/env bash
# A run on one slice of Cloud TPU VMs: makes the slice, installs, runs on every
# host, and goes on after a preemption until the run has finished or failed.
#
#   TPU=my-run ZONE=us-east5-a TYPE=v5p-128 SOURCE=https://HOST/OWNER/dppo_jax \
#     SHARE=10.0.0.2:/runs SPOT=1 experiments/launch/tpu_vm.sh \
#     --config=configs/tv_topk.py --workdir=/runs/tv_topk
#
# DRY_RUN=1 prints the commands instead. Flags of gcloud, checked with Google
# Cloud SDK 528:
#   https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources
#   https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh
# States of a queued resource: https://cloud.google.com/tpu/docs/queued-resources
set -euo pipefail
# shellcheck source=experiments/launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

set_main "$@"
need TPU 'name of the slice and of the request for it'
need ZONE 'for example us-east5-a'
need TYPE 'accelerator type, for example v5p-128'
need SOURCE 'what git clones, with the configs'
need SHARE 'NFS export for the work directory, HOST:/PATH, mounted at /runs'
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}  # gcloud compute tpus tpu-vm versions list
REVISION=${REVISION:-main}
EXTRAS=${EXTRAS:-tpu,verifiers,hub}
SECONDS_BETWEEN=${SECONDS_BETWEEN:-60}

request() {  # request VERB FLAG...
  local verb=$1
  shift
  act gcloud compute tpus queued-resources "$verb" "$TPU" --zone="$ZONE" "$@"
}

on_all_hosts() {
  act gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="$1"
}

state() {  # '' if there is no such request.
  [[ ${DRY_RUN:-} ]] ||
    request describe --format='value(state.state)' 2>/dev/null || true
}

# Waits until there is a slice to log in to.
acquire() {
  while true; do
    case $(state) in
      ACTIVE) return ;;
      '')
        request create --node-id="$TPU" --accelerator-type="$TYPE" \
          --runtime-version="$RUNTIME" ${SPOT:+--spot} ;;
      # A preempted slice never comes back; its request must go first.
      SUSPENDED | FAILED) request delete --force --quiet ;;
    esac
    [[ ! ${DRY_RUN:-} ]] || return 0
    sleep "$SECONDS_BETWEEN"
  done
}

# What was left running by a connection that broke would hold the TPU: it gets
# five minutes to save and end. [d] keeps pkill from finding the shell that calls it. The
# images' own Python is too old, so uv brings one.
PREPARE="
pkill -TERM -f '[d]ppo_jax.main';
for _ in \$(seq 300); do
  pgrep -f '[d]ppo_jax.main' >/dev/null || break; sleep 1; done;
pkill -KILL -f '[d]ppo_jax.main';
set -e;
sudo mkdir -p /runs;
mountpoint -q /runs || {
  which mount.nfs >/dev/null ||
    { sudo apt-get update -q; sudo apt-get install -yq nfs-common; };
  sudo mount -t nfs $SHARE /runs; };
[ -d dppo_jax ] || git clone -q $(quoted "$SOURCE") dppo_jax;
cd dppo_jax; git fetch -q origin $REVISION; git checkout -q FETCH_HEAD;
python3 -m pip install -q --user uv;
[ -d .venv ] || python3 -m uv venv -q --python=3.12 .venv;
python3 -m uv pip install -q --python=.venv '.[$EXTRAS]'"
RUN="cd dppo_jax && . .venv/bin/activate && $(quoted "${main[@]}")"

while true; do
  code=0
  acquire
  on_all_hosts "$PREPARE" && on_all_hosts "$RUN" || code=$?
  [[ $code != 0 ]] || break
  echo "$0: a host ended with exit code $code." >&2
  if [[ $code != "$INTERRUPTED" ]]; then
    # A host that vanished looks like a failure until the slice is seen to be
    # gone, which takes a moment.
    sleep "$SECONDS_BETWEEN"
    [[ $(state) != ACTIVE ]] || exit "$code"
  fi
done
echo "Done. What still costs: $(DRY_RUN=1 request delete --force)" >&2
