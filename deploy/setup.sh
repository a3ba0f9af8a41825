#!/usr/bin/env bash
# Sets up a virtual environment: deploy/setup.sh PYTHON VENV. Says what it does; downloads nothing before the preflight.
set -euo pipefail
python=$1 venv=$2
here=$(cd "$(dirname "$0")/.." && pwd)
if ! command -v "$python" >/dev/null; then
  echo "vivace set-up: no $python; apt-get install python3.11 python3.11-venv python3.11-dev, or make PYTHON=..." >&2
  exit 1
fi
"$python" "$here/deploy/preflight.py"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
quiet() { # pip's output is shown only if it fails
  local log; log=$(mktemp)
  if ! "$@" >"$log" 2>&1; then tail -n 30 "$log" >&2; rm -f "$log"; return 1; fi
  rm -f "$log"
}

# torch first: an installed 2.13 is kept; without a GPU the CPU build is taken, not gigabytes of CUDA
if "$venv/bin/python" -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13."))' 2>/dev/null; then
  echo "set-up: keeping the installed torch"
else
  options=()
  if [ ! -e /dev/nvidiactl ]; then
    chosen=$(pip install --dry-run --quiet --no-deps --report - torch==2.13.0 2>/dev/null |
      "$venv/bin/python" -c 'import json, sys; i = json.load(sys.stdin)["install"][0]; print(i["metadata"]["version"], i["download_info"]["url"])' || true)
    case "$chosen" in
      *+cpu*|*%2Bcpu*) ;; # pip's own settings already lead to the CPU build
      *) options=(--extra-index-url https://download.pytorch.org/whl/cpu) ;;
    esac
  fi
  echo "set-up: torch 2.13.0 ${options[*]-}"
  quiet pip install "${options[@]}" torch==2.13.0
fi
echo "set-up: the other packages of requirements.txt (about two minutes)"
quiet pip install -r "$here/requirements.txt"
quiet pip install --no-deps --no-build-isolation -e "$here"
touch "$venv/.ready"
