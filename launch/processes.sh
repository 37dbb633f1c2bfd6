# shellcheck shell=bash
# Sourced by launchers that start processes themselves and wait for them.

# pass_signals FORWARD: calls FORWARD SIGNAL for what this script gets; before it starts anything, so
# that no signal ends it and leaves its processes behind.
pass_signals() {
  # shellcheck disable=SC2064 # the name as it is now
  trap "$1 INT" INT && trap "$1 TERM" TERM && trap "$1 USR1" USR1
}

# await_all FORWARD PID...: waits for all; the exit code is that of the first that fails. FORWARD
# SIGNAL is called to end those that wait for one that was refused at its start. Those left 90 seconds after a failure are killed.
await_all() {
  local forward=$1 first=0 failed=0 asked=0 pid code running
  shift
  local left=("$@")
  while ((${#left[@]})); do
    running=()
    for pid in "${left[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        running+=("$pid")
        continue
      fi
      wait "$pid"
      code=$?
      if ((code && !first)); then
        first=$code failed=$SECONDS
        echo "system process $pid was the first to fail, with exit code $code" >&2
      fi
    done
    left=("${running[@]+"${running[@]}"}")
    ((${#left[@]})) || break
    # One that was refused, by code 1 or 2, may leave the others waiting for it to come.
    if ((first == 1 || first == 2)) && ((!asked && SECONDS - failed > 10)); then
      asked=1
      "$forward" TERM
    elif ((first && SECONDS - failed > 90)); then
      echo "killed, since they did not end by themselves: processes ${left[*]}" >&2
      kill -s KILL "${left[@]}" 2>/dev/null
    fi
    sleep 0.2
  done
  # The last lines of output.
  wait
  return "$first"
}
