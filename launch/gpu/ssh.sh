#!/usr/bin/env bash
# Trains on several GPU machines over ssh, without a scheduler: one process a machine, which uses
# all its GPUs. The checkout and its .venv lie in the same directory everywhere, the workdir on a
# file system that all share.
#
#     launch/gpu/ssh.sh --hosts=node0,node1 --directory=/shared/mor_jax [--dry_run] -- flags
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=launch/checks.sh
source "$root/launch/checks.sh"
# shellcheck source=launch/processes.sh
source "$root/launch/processes.sh"

usage() {
  cat <<'EOF'
launch/gpu/ssh.sh [flags] -- flags of launch/train.py

  --hosts=A,B,...      the machines, as ssh knows them; the first hosts the coordinator
  --directory=DIR      the checkout on each of them
  --address=HOST       the first machine as the others reach it (default: its name in --hosts)
  --port=PORT          of the coordinator (default 8476)
  --restarts=N         starts again when a process was lost (default 10)
  --dry_run            print what would run, and run nothing
EOF
}

hosts="" directory="" address="" port=8476 restarts=10 dry_run=0
read_flags "--hosts= --directory= --address= --port= --restarts= --dry_run --help" "$@"
shift "$taken"
required --hosts "$hosts" node0,node1
required --directory "$directory" /shared/mor_jax
matching --hosts "$hosts" '[A-Za-z0-9_.@-]+(,[A-Za-z0-9_.@-]+)*' "must be names with commas between"
matching --port "$port" '[1-9][0-9]{0,4}' "must be a port. Try 8476"
matching --restarts "$restarts" '[0-9]+' "must be a number. Try 10"
flags_of_training "$@"

IFS=, read -ra machines <<<"$hosts"
address="${address:-${machines[0]#*@}}"
# Where the training on each machine leaves its process number, for signals.
mark="/tmp/mor_jax-$port.pid"

pids=()
# shellcheck disable=SC2329 # called by await_all
forward() {
  local machine
  for machine in "${machines[@]}"; do
    # shellcheck disable=SC2029 # expanded here on purpose
    ssh "$machine" "kill -s $1 \"\$(cat $mark)\"" 2>/dev/null &
  done
}

pass_signals forward
for i in "${!machines[@]}"; do
  training="$(quoted .venv/bin/python launch/train.py --distributed=manual \
    --coordinator="$address:$port" --processes="${#machines[@]}" --process="$i" "$@")"
  # The number is that of again.sh, which passes signals on, also between two starts.
  remote="cd $(quoted "$directory") && echo \$\$ >$mark && exec launch/again.sh $restarts $training"
  if ((dry_run)); then
    quoted ssh "${machines[i]}" "$remote"
    continue
  fi
  # shellcheck disable=SC2029 # expanded here on purpose
  ssh "${machines[i]}" "$remote" > >(trap '' INT; exec sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done
((dry_run)) || await_all forward "${pids[@]}"
