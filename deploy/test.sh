#!/usr/bin/env bash
# The tests. Those that need no server run beside those that do, which mostly wait for one, and are shown after them.
#   deploy/test.sh PYTHON [ARGUMENTS OF PYTEST]      with arguments: as they say, all in one
set -u
python=$1
shift
if [ $# -gt 0 ]; then exec "$python" -m pytest "$@"; fi
log=$(mktemp)
nice -n 10 "$python" -m pytest tests/unit >"$log" 2>&1 &
unit=$!
trap 'kill "$unit" 2>/dev/null; rm -f "$log"' EXIT
"$python" -m pytest tests/end_to_end tests/system
served=$?
wait "$unit"
alone=$?
echo "tests/unit:"
cat "$log"
exit $((served > alone ? served : alone))
