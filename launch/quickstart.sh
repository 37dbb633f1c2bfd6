#!/usr/bin/env bash
# Trains a small Mixture-of-Recursions model on this machine's CPU and shows what it learnt.
# Extra arguments go to launch/train.py: ./launch/quickstart.sh --config.steps=50
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install requirements.txt

workdir="$root/runs/quickstart"
if [[ -d "$workdir" && "$*" != *--workdir* ]]; then
  echo "Going on with $workdir. To start over: rm -r '$workdir'"
fi
exec "$python" "$root/launch/train.py" \
  --config="$root/configs/quickstart.py" --workdir="$workdir" "$@"
