"""Healthy is what answers: asks ``recommend`` a question. Triton's own readiness stays 200 when a worker has died.

Standard library only. A server that answered before and has not for ``VIVACE_RESTART_S`` is told to stop, after twice
that it is killed, and its restart policy starts it anew: tritonserver alone never revives a dead worker, and whoever
watches it may hang.
"""

import json
import os
import pathlib
import signal
import sys
import time
import urllib.request

URL = os.environ.get("VIVACE_URL", "http://127.0.0.1:8000")
ANSWERED = pathlib.Path("/tmp/vivace-answered")
TIMEOUT_S = 4.0
RESTART_S = float(os.environ.get("VIVACE_RESTART_S", "20"))  # 0: never
QUESTION = {
    "inputs": [
        {"name": "USER_ID", "datatype": "BYTES", "shape": [1, 1], "data": [""]},
        {"name": "QUERY", "datatype": "BYTES", "shape": [1, 1], "data": [""]},
        {"name": "HISTORY", "datatype": "BYTES", "shape": [1, 1], "data": [""]},
        {"name": "TOP_K", "datatype": "INT32", "shape": [1, 1], "data": [1]},
    ]
}


def answers() -> bool:
    request = urllib.request.Request(f"{URL}/v2/models/recommend/infer", json.dumps(QUESTION).encode())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            outputs = {o["name"]: o["data"] for o in json.load(reply)["outputs"]}
    except (OSError, ValueError, KeyError) as error:
        print(f"recommend: {error}", file=sys.stderr)
        return False
    return len(outputs["ITEM_ID"]) == 1


def end_server(signal_number: int) -> None:
    """Sends a signal to what the container's init started; outside a container to nobody."""
    if pathlib.Path("/proc/1/comm").read_text().strip() not in ("docker-init", "tini", "catatonit"):
        return
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has just ended
            continue
        if parent == "1":
            os.kill(int(stat.parent.name), signal_number)


def main() -> int:
    if answers():
        ANSWERED.touch()
        return 0
    silent_s = time.time() - ANSWERED.stat().st_mtime if ANSWERED.exists() else 0.0
    if RESTART_S and silent_s > RESTART_S:
        end_server(signal.SIGTERM if silent_s < 2 * RESTART_S else signal.SIGKILL)
    return 1


if __name__ == "__main__":
    sys.exit(main())
