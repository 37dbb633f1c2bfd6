#!/usr/bin/env bash
# Runs a command again, up to N times, while another process of its run was lost (exit code 76) or
# it crashed (128 and more, but for signals that a person sends); for machines without a scheduler.
#
#     launch/again.sh N COMMAND...
set -uo pipefail
[[ "${1:-}" =~ ^[0-9]+$ && $# -ge 2 ]] || {
  echo "usage: $0 N COMMAND..." >&2
  exit 2
}
times=$1
shift
for ((start = 0; ; start++)); do
  "$@"
  code=$?
  # 130 and 143: interrupted or terminated.
  ((code == 76 || (code >= 128 && code != 130 && code != 143))) || exit "$code"
  ((start < times)) || exit "$code"
  echo "exit code $code: starting again ($((start + 1)) of $times)" >&2
  # The others need as long to end as they take to notice.
  sleep "${MOR_JAX_PAUSE:-15}"
done
