"""Keeps the door: starts Envoy again where it ended, and tells it whom to ask and what to say of readiness."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from serving.door.endpoints import Endpoints
from serving.door.process import Door
from serving.process import SilenceWatch

LOOK_S = 0.05
SILENT_S = 5.0  # an Envoy that says nothing for so long is ended and started again


class DoorKeeper:
    """A context manager, in a thread of its own that waits for no server and lives as long as the door: with the thread
    that started it Envoy would go (PR_SET_PDEATHSIG).

    ``ready``: whether the public ports shall say so; ``endpoints``: who stands behind the door; ``restarted`` is called
    for each Envoy that is started again.
    """

    def __init__(
        self,
        door: Door,
        ready: Callable[[], bool],
        endpoints: Callable[[], Endpoints],
        restarted: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.door, self._ready, self._endpoints, self._restarted, self._say = door, ready, endpoints, restarted, say
        self._silence = SilenceWatch("door", SILENT_S, say)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)

    def __enter__(self) -> DoorKeeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def alive_itself(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(LOOK_S):
            try:
                self.door.point(self._endpoints)
                if not self.door.running():
                    self._restarted()
                    self._say("door: Envoy ended by itself; starting it again")
                    self.door.start()
                self.door.tell_ready(self._ready())
                if time.monotonic() >= due:
                    due = time.monotonic() + 1.0
                    self._silence.look(self.door.pid, self.door.answers())
            except Exception as error:
                self._say(f"{error}; trying again")
                self._stop.wait(1.0)
