"""What the guard's configuration promises Triton."""

from __future__ import annotations

import json
import socket

from serving.door.config import DoorOptions, Sockets, render

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
    sockets = Sockets(tmp_path)
    config = render(DoorOptions(host="127.0.0.1", http_port=1, grpc_port=2, metrics_port=3), sockets)
    at_once = 0
    for cluster in json.loads(config)["static_resources"]["clusters"]:
        (endpoints,) = cluster["load_assignment"]["endpoints"]
        if endpoints["lb_endpoints"][0]["endpoint"]["address"]["pipe"]["path"] == str(sockets.http):
            at_once += cluster["circuit_breakers"]["thresholds"][0]["max_requests"]
    assert 0 < at_once < room()
