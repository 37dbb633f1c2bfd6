# shellcheck shell=bash
# Sourced by the scripts beside it: makes and fills the project's own .venv.
# Defines: root (the repository), python (its .venv's interpreter), install FILE...

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"

# Prints the first interpreter that is new enough; PYTHON names one to use instead.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "mor_jax needs Python 3.11 or newer; python3 is $(python3 --version 2>&1 || true)." >&2
  echo "Install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
  return 1
}

make_venv() {
  "$python" -c '' 2>/dev/null && return
  local base
  base="$(find_python)"
  echo "Making .venv with $("$base" --version)"
  if ! "$base" -m venv --clear "$root/.venv"; then
    echo "Making .venv failed. On Debian and Ubuntu: apt install python3-venv" >&2
    return 1
  fi
}

# Installs the requirements files that have changed since the last time, all in one step.
install() {
  make_venv
  local stamp="$root/.venv/requirements.stamp" wanted file args=()
  wanted="$(cd "$root" && cat "$@" | cksum) $*"
  if [[ -f "$stamp" ]] && grep -qxF "$wanted" "$stamp"; then
    return
  fi
  for file in "$@"; do args+=(-r "$root/$file"); done
  echo "Installing $* into .venv (once; a few minutes)"
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null
  "$python" -m pip install --quiet --disable-pip-version-check "${args[@]}"
  echo "$wanted" >>"$stamp"
}
