#!/usr/bin/env bash
# TPU VMs through gcloud: asks for one or several slices, sets them up, trains on all of their
# hosts, stops, gives them back.
#
#     launch/tpu_vm/pod.sh create --name=NAME --zone=ZONE --accelerator_type=v5litepod-256 ...
#     launch/tpu_vm/pod.sh setup  --name=NAME --zone=ZONE --repository=URL --commit=SHA
#     launch/tpu_vm/pod.sh run    --name=NAME --zone=ZONE -- flags of launch/train.py
#     launch/tpu_vm/pod.sh stop|delete --name=NAME --zone=ZONE
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=launch/checks.sh
source "$root/launch/checks.sh"

usage() {
  cat <<'EOF'
launch/tpu_vm/pod.sh create|setup|run|stop|delete [flags]

  --name=NAME          of the queued resource
  --zone=ZONE          --project=PROJECT (default: that of gcloud)
  --dry_run            print what would run, and run nothing
create:
  --accelerator_type=T v5litepod-256, v5p-512, v6e-256
  --runtime_version=V  default: v2-alpha-tpuv5-lite, v2-alpha-tpuv5 or v2-alpha-tpuv6e
  --slices=N           slices of that type (default 1)
  --spot               cheaper, and preempted at any time
setup:
  --repository=URL     --commit=SHA: the code; every host gets the same
run:
  --restarts=N         starts again when a process was lost (default 10)
EOF
}

action="${1:-}"
[[ "$action" != --help ]] || {
  usage
  exit 0
}
[[ "$action" =~ ^(create|setup|run|stop|delete)$ ]] ||
  fail "'$action': must be create, setup, run, stop or delete"
shift
name="" zone="" project="" accelerator_type="" runtime_version="" slices=1 spot=0 repository=""
commit="" restarts=10 dry_run=0
read_flags "--help --name= --zone= --project= --accelerator_type= --runtime_version= --slices= --spot \
  --repository= --commit= --restarts= --dry_run" "$@"
shift "$taken"
required --name "$name" my-pod
required --zone "$zone" us-west4-b
matching --name "$name" '[a-z]([a-z0-9-]*[a-z0-9])?' "must be lower case letters, digits and -"
matching --slices "$slices" '[1-9][0-9]*' "must be a positive number. Try 2"
matching --restarts "$restarts" '[0-9]+' "must be a number. Try 10"
where=(--zone="$zone")
[[ -z "$project" ]] || where+=(--project="$project")

create() {
  required --accelerator_type "$accelerator_type" v5litepod-256
  if [[ -z "$runtime_version" ]]; then
    case "$accelerator_type" in
      v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime_version=v2-alpha-tpuv5 ;;
      v6e-*) runtime_version=v2-alpha-tpuv6e ;;
      *)
        fail "--accelerator_type=$accelerator_type: its runtime is not known here. \
Add --runtime_version"
        ;;
    esac
  fi
  local command=(gcloud compute tpus queued-resources create "$name" "${where[@]}"
    --accelerator-type="$accelerator_type" --runtime-version="$runtime_version")
  if ((slices == 1)); then
    command+=(--node-id="$name")
  else
    command+=(--node-count="$slices" --node-prefix="$name")
  fi
  ((!spot)) || command+=(--spot)
  run "${command[@]}"
}

# on_all_hosts COMMAND: of every slice, at the same time.
on_all_hosts() {
  run gcloud compute tpus queued-resources ssh "$name" "${where[@]}" --node=all --worker=all \
    --command="$1"
}

setup() {
  required --repository "$repository" https://example.com/mor_jax.git
  required --commit "$commit" "$(git -C "$root" rev-parse HEAD 2>/dev/null || echo SHA)"
  local url checkout
  url="$(quoted "$repository")" checkout="$(quoted "$commit")"
  on_all_hosts "if [ ! -d mor_jax ]; then git clone $url mor_jax; fi && cd mor_jax && git fetch && \
git checkout --detach $checkout && python3 -m venv .venv && \
.venv/bin/pip install -c requirements.lock -r requirements.txt -r requirements-tpu.txt"
}

train() {
  flags_of_training "$@"
  on_all_hosts "cd mor_jax && launch/again.sh $restarts $(quoted .venv/bin/python launch/train.py \
    --distributed=auto "$@")"
}

case "$action" in
  create) create ;;
  setup) setup ;;
  run) train "$@" ;;
  stop) on_all_hosts "pkill -TERM -f launch/train.py" ;;
  delete) run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force ;;
esac
