#!/usr/bin/env bash
# Builds the documentation with its API reference to docs/_build/html, and serves it on this machine.
#   ./launch/docs.sh                 builds, serves, prints the address; Ctrl-C ends it
#   ./launch/docs.sh --build         only builds
#   ./launch/docs.sh --fresh         forgets earlier builds, and runs the notebook again
#   ./launch/docs.sh --port=8080     serves on this port (8001)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

port=8001 only_build=''
for argument in "$@"; do
  case "$argument" in
    --build) only_build=1 ;;
    --fresh) rm -rf "$root/docs/_build" "$root/docs/api" ;;
    --port=*) port="${argument#--port=}" ;;
    *)
      echo "$argument: is not a flag of this script. It has --build, --fresh and --port=8001" >&2
      exit 2
      ;;
  esac
done
if ! [[ "$port" =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then
  echo "--port=$port: must be a number from 1 to 65535. Try --port=8001" >&2
  exit 2
fi

# The API reference imports every module, so the packages of all of them.
install requirements.txt requirements-convert.txt requirements-serve.txt requirements-eval.txt \
  requirements-docs.txt
cd "$root"
JAX_PLATFORMS=cpu "$python" -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html
echo "Built docs/_build/html/index.html"
if [[ -z "$only_build" ]]; then
  echo "Serving http://127.0.0.1:$port until Ctrl-C"
  exec "$python" -m http.server "$port" --bind 127.0.0.1 --directory docs/_build/html >/dev/null
fi
