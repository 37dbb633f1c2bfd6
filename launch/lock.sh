#!/usr/bin/env bash
# Makes requirements.lock anew: one version of every package, for Python 3.11 to 3.13 and every
# platform, that fits all requirements*.txt; prints what changed. Arguments go to uv:
#   ./launch/lock.sh                            the newest versions that the ranges allow
#   ./launch/lock.sh --upgrade-package=jax      only jax, and what it needs
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv
"$python" -m pip install --quiet --disable-pip-version-check 'uv>=0.9'

cd "$root"
old="$(mktemp)" new="$(mktemp)"
trap 'rm -f "$old" "$new"' EXIT
[[ ! -f requirements.lock ]] || cp requirements.lock "$old"
cp "$old" "$new"
if (($# == 0)); then set -- --upgrade; fi
# One version for all Pythons (fewest), so that what is tested is what others get. torch names its
# CUDA packages by exact version itself. No hashes: torch has builds for CPUs beside that for CUDA.
if ! "$python" -m uv pip compile requirements*.txt --output-file="$new" --quiet --no-config \
  --universal --python-version=3.11 --fork-strategy=fewest --strip-extras --no-emit-index-url \
  --no-annotate --custom-compile-command=./launch/lock.sh "$@"; then
  echo "requirements.lock: is as it was ($new above is a copy of it). If it is damaged:" \
    "git checkout requirements.lock" >&2
  exit 1
fi
cp "$new" requirements.lock

if changed="$(diff --unchanged-line-format= --old-line-format='- %L' --new-line-format='+ %L' \
  <(grep -v '^#' "$old") <(grep -v '^#' "$new"))"; then
  echo "requirements.lock: nothing changed, $(grep -c == "$new") packages"
else
  echo "$changed"
fi
