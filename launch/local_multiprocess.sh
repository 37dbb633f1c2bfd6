#!/usr/bin/env bash
# Runs one training in N real processes on this machine's CPU, over its loopback.
#
#     launch/local_multiprocess.sh N [--devices=K] -- flags of launch/train.py
#
# Each process has K simulated devices (default 1). Lines of output start with the number of their
# process. When one ends with an error the others notice and end by themselves; those that do not
# are killed 90 seconds later. The exit code is that of the first to fail. Ctrl-C, SIGTERM and
# SIGUSR1 go to all of them.
set -uo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
# shellcheck source=launch/processes.sh
source "$root/launch/processes.sh"

usage() {
  echo "usage: $0 N [--devices=K] -- flags of launch/train.py" >&2
  echo "error: $1" >&2
  exit 2
}

[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || usage "N=${1:-}: must be a number of processes. Try 2"
processes=$1 devices=1
shift
while (($#)); do
  case "$1" in
    --devices=*)
      devices="${1#*=}"
      [[ "$devices" =~ ^[1-9][0-9]*$ ]] || usage "$1: must be a positive number. Try --devices=4"
      ;;
    --)
      shift
      break
      ;;
    *) usage "$1: is not a flag of this script. Put flags of launch/train.py after --" ;;
  esac
  shift
done
(($#)) || usage "nothing after --: give at least --config=FILE and --workdir=DIR"

python="${PYTHON:-$python}"
[[ -x "$(command -v "$python")" ]] || python=python3
port="$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')" ||
  usage "$python: is not a Python that works. Name one: PYTHON=/path/to/python $0 ..."

pids=()
# shellcheck disable=SC2329 # called by what processes.sh sets up
forward() {
  # Quiet about those that ended meanwhile.
  kill -s "$1" "${pids[@]}" 2>/dev/null
}

pass_signals forward
for ((i = 0; i < processes; i++)); do
  JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices" PYTHONUNBUFFERED=1 \
    "$python" "$root/launch/train.py" --distributed=manual --coordinator="127.0.0.1:$port" \
    --processes="$processes" --process="$i" "$@" > >(trap '' INT; exec sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done

await_all forward "${pids[@]}"
