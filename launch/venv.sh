# shellcheck shell=bash
# Sourced by the scripts beside it: makes and fills the project's own virtual environment.
# Defines: root (the repository), python (the environment's interpreter), install FILE..., which
# installs requirements files and the command `mor`.
# LATEST=1 installs the newest versions that the ranges allow, in an environment of their own,
# instead of those of requirements.lock: that finds what tomorrow's releases break.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv${LATEST:+-latest}"
python="$venv/bin/python"

# Prints the first interpreter that is new enough; PYTHON names one to use instead.
find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11)
  if [[ -n "${PYTHON:-}" ]]; then
    if ! "$PYTHON" -c '' 2>/dev/null; then
      echo "PYTHON=$PYTHON: is no interpreter that runs. Give the path of one, or leave it out" >&2
      return 1
    fi
    candidates=("$PYTHON")
  fi
  for candidate in "${candidates[@]}"; do
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
  echo "Making $(basename "$venv") with $("$base" --version)"
  if ! "$base" -m venv --clear "$venv"; then
    echo "Making $(basename "$venv") failed. On Debian and Ubuntu: apt install python3-venv" >&2
    return 1
  fi
}

# Installs requirements files, all in one step: at the versions of requirements.lock, where anything
# has changed since the last time; with LATEST=1 at the newest ones, always.
install() {
  make_venv
  local stamp="$venv/requirements.stamp" wanted file args=()
  if [[ ! -f "$root/requirements.lock" ]]; then
    echo "requirements.lock: is missing. Get it back: git checkout requirements.lock" >&2
    return 1
  fi
  wanted="$(cd "$root" && cat "$@" requirements.lock pyproject.toml | cksum) $*"
  if [[ -z "${LATEST:-}" && -f "$stamp" ]] && grep -qxF "$wanted" "$stamp"; then
    return
  fi
  if [[ -n "${LATEST:-}" ]]; then
    args=(--upgrade --upgrade-strategy=eager)
  else
    args=(--constraint "$root/requirements.lock")
  fi
  for file in "$@"; do args+=(--requirement "$root/$file"); done
  # The command `mor`, of this checkout.
  args+=(--editable "$root")
  echo "Installing $* into $(basename "$venv") (${LATEST:+newest versions; }a few minutes)"
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null
  "$python" -m pip install --quiet --disable-pip-version-check "${args[@]}"
  echo "$wanted" >>"$stamp"
}
