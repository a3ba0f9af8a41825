"""What the guard's configuration promises Triton."""

from __future__ import annotations

import json
import socket

from serving.door.config import render
from serving.door.endpoints import OTHERS, RECOMMEND
from serving.door.options import DoorFiles, DoorOptions

COMMAND_BYTES = 17  # of libevhtp's ``struct evthr_cmd``


def room() -> int:
    """Answers that a socket of Triton's HTTP threads holds on this machine."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near, far:
        near.setblocking(False)
        for sent in range(100_000):
            try:
                near.send(bytes(COMMAND_BYTES))
            except BlockingIOError:
                return sent
    raise AssertionError("a socket without a limit")


def test_triton_gets_fewer_calls_than_one_of_its_threads_can_hand_on(tmp_path):
    config = render(DoorOptions(host="127.0.0.1", http_port=1, grpc_port=2, metrics_port=3), DoorFiles(tmp_path))
    at_once = 0
    for cluster in json.loads(config)["static_resources"]["clusters"]:
        if cluster["name"] in (RECOMMEND, OTHERS):  # over HTTP
            at_once += cluster["circuit_breakers"]["thresholds"][0]["max_requests"]
    assert 0 < at_once < room()
