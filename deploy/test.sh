#!/usr/bin/env bash
# The tests, in two streams side by side, as those that need a server mostly wait for one. The second is shown after the
# first.
#   deploy/test.sh PYTHON [ARGUMENTS OF PYTEST]      with arguments: as they say, all in one
set -u
python=$1
shift
if [ $# -gt 0 ]; then exec "$python" -m pytest "$@"; fi
second=(tests/unit) first=(tests/end_to_end)
for room in tests/system/*/; do
  case $room in
    */benchmarks/ | */deploy/ | */docs/ | */search/ | */store/ | */training/) second+=("$room") ;;
    *__pycache__/) ;;
    *) first+=("$room") ;;
  esac
done
log=$(mktemp)
nice -n 10 "$python" -m pytest "${second[@]}" >"$log" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null; rm -f "$log"' EXIT
"$python" -m pytest "${first[@]}"
served=$?
wait "$beside"
other=$?
echo "${second[*]}:"
cat "$log"
exit $((served > other ? served : other))
