#!/usr/bin/env bash
# Lint, format and tests, as CI runs them. Arguments go to pytest: ./launch/test.sh -k router
# BUSY=1 runs the tests beside a busy loop on each core: none may rest on a machine's speed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install requirements.txt requirements-dev.txt requirements-convert.txt requirements-serve.txt \
  requirements-eval.txt requirements-docs.txt

cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
if [[ -n "${BUSY:-}" ]]; then
  for ((core = 0; core < $(nproc); core++)); do
    while :; do :; done &
  done
  # shellcheck disable=SC2046
  trap 'kill $(jobs -p); wait' EXIT
fi
"$python" -m pytest --numprocesses="${TEST_WORKERS:-2}" --dist=worksteal "$@"
