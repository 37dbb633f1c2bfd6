#!/usr/bin/env bash
# Runs a command again, up to N times, while another process of its run was lost (exit code 76) or
# it crashed (128 and more, but for signals that ask it to end); for machines without a scheduler.
#
#     launch/again.sh N COMMAND...
#
# SIGINT, SIGTERM and SIGUSR1 go on to the command, and nothing is started after one. A command that
# a signal ended before it could listen ends this script with 75, as one that was listening does.
set -uo pipefail
[[ "${1:-}" =~ ^[0-9]+$ && $# -ge 2 ]] || {
  echo "usage: $0 N COMMAND..." >&2
  exit 2
}
times=$1
shift

child="" asked="" signalled=0
# shellcheck disable=SC2329 # called by the traps
pass_on() {
  asked=$1 signalled=1
  # As SIGTERM: a command in the background of a script ignores SIGINT until it listens.
  local name=${1/INT/TERM}
  [[ -z "$child" ]] || kill -s "$name" "$child" 2>/dev/null
}
for name in INT TERM USR1; do
  # shellcheck disable=SC2064 # the name as it is now
  trap "pass_on $name" "$name"
done

stopped() {
  echo "stopped: SIG$1: $2. Run the same command again to resume" >&2
  exit 75
}

for ((start = 0; ; start++)); do
  # In the background, so that this script hears of signals meanwhile.
  "$@" <&0 &
  child=$!
  [[ -z "$asked" ]] || pass_on "$asked"
  while :; do
    signalled=0
    wait "$child"
    code=$?
    # A trapped signal ends `wait` early.
    ((signalled)) || break
  done
  child=""
  case "$code" in
    130 | 138 | 143) stopped "$(kill -l "$code")" "ended before it could listen" ;;
  esac
  ((code == 76 || code >= 128)) || exit "$code"
  ((start < times)) && [[ -z "$asked" ]] || exit "$code"
  echo "exit code $code: starting again ($((start + 1)) of $times)" >&2
  # The others need as long to end as they take to notice.
  sleep "${MOR_JAX_PAUSE:-15}" &
  child=$!
  [[ -n "$asked" ]] || wait "$child"
  kill "$child" 2>/dev/null
  child=""
  [[ -z "$asked" ]] || stopped "$asked" "nothing was running"
done
