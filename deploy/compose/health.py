"""Healthy is what answers: asks ``recommend`` a question. Triton's own readiness stays 200 when a worker has died.

Standard library only. A server that answered before and has not for ``VIVACE_RESTART_S`` is told to stop, and its
restart policy starts it anew: tritonserver alone never revives a dead worker, and a watchdog may hang.
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
TRIES, WAIT_S = 3, 1.0
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
        with urllib.request.urlopen(request, timeout=2) as reply:
            outputs = {o["name"]: o["data"] for o in json.load(reply)["outputs"]}
    except (OSError, ValueError, KeyError) as error:
        print(f"recommend: {error}", file=sys.stderr)
        return False
    return len(outputs["ITEM_ID"]) == 1


def main() -> int:
    for _ in range(TRIES):
        if answers():
            ANSWERED.touch()
            return 0
        time.sleep(WAIT_S)
    if RESTART_S and ANSWERED.exists() and time.time() - ANSWERED.stat().st_mtime > RESTART_S:
        ANSWERED.unlink()
        os.kill(1, signal.SIGTERM)
    return 1


if __name__ == "__main__":
    sys.exit(main())
