"""Readers that share the log of live events: each event goes to one of a group, at least once.

    for batch in follow(store, "warehouse", stop=stop):
        write(batch)  # when this is done, the batch is acknowledged

What a reader that died had in hand goes to another of its group. Over LMDB the group's readers are processes of one
machine, over a Valkey they may be anywhere.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from vivace.store.interface import Delivery, EventGroups, StoreUnreachableError

T = TypeVar("T")
log = logging.getLogger(__name__)
MOST = 500  # events of a batch
IDLE_S = 60.0  # a batch that is not acknowledged by then goes to another reader
EVERY_S = 0.5  # how often a reader that has nothing to do asks again
NAME = r"[A-Za-z0-9_.-]{1,64}"
SAY_EVERY_S = 60.0


def check_name(what: str, name: str) -> str:
    """``name`` of a group or a consumer. Raises ValueError for one that is none."""
    if not re.fullmatch(NAME, name):
        raise ValueError(f"{what}: expected 1 to 64 letters, digits, '-', '_' and '.', got {name!r}")
    return name


def no_such_group(group: str, there: list[str]) -> ValueError:
    known = f"those there are: {', '.join(there)}" if there else "there is none yet"
    return ValueError(f"group {group!r}: no such group of readers ({known}); 'vivace events follow' makes it")


def consumer_name() -> str:
    """A name that no other reader has."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"


def follow(
    store: EventGroups,
    group: str,
    consumer: str = "",
    *,
    after: int | None = None,
    most: int = MOST,
    idle_s: float = IDLE_S,
    stop: Callable[[], bool] = lambda: False,
    once: bool = False,
) -> Iterator[list[Delivery]]:
    """Batches of events that come, until ``stop``; with ``once`` until nothing is left that this reader could have.

    A batch is acknowledged when the next one is asked for; whoever leaves the loop by an error, or is killed, has not
    done so, and the batch comes again, to any reader of the group, ``idle_s`` after it was handed out. So does one that
    takes longer than that. A group that is not there is made, behind the event ``after`` (None: the newest). A store
    that does not answer is asked again until it does; with ``once`` StoreUnreachableError is raised."""
    who = check_name("consumer", consumer) if consumer else consumer_name()
    check_name("group", group)
    if most < 1 or idle_s <= 0:
        raise ValueError(f"expected batches of at least 1 event and an idle time above 0 s, got {most} and {idle_s:g}")
    if _answered(lambda: store.create_group(group, after), stop, once) is None:
        return
    while not stop():
        batch = _answered(lambda: store.read_group(group, who, most, int(idle_s * 1000)), stop, once)
        if batch:
            yield batch
            _answered(partial(store.acknowledge, group, [d.number for d in batch]), stop, once)
        elif batch is None or once:
            return
        else:
            _wait(stop)


def _answered(ask: Callable[[], T], stop: Callable[[], bool], once: bool) -> T | None:
    """What ``ask`` returns once the store answers; None where ``stop`` comes before it does. ``once``: it is not asked
    again."""
    said = False
    while True:
        try:
            return ask()
        except StoreUnreachableError as error:
            if once:
                raise
            if not said:
                log.warning("%s; asking again until it answers", error)
            said = True
            if stop():
                return None
            _wait(stop)


def _wait(stop: Callable[[], bool]) -> None:
    end = time.monotonic() + EVERY_S
    while not stop() and time.monotonic() < end:
        time.sleep(0.05)


@dataclass
class Missed:
    """Says in the log what groups have lost, at most once a minute each."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: dict[str, float] = field(default_factory=dict)
    _lost: dict[str, int] = field(default_factory=dict)

    def __call__(self, group: str, count: int) -> None:
        with self._lock:
            self._lost[group] = self._lost.get(group, 0) + count
            if time.monotonic() < self._next.get(group, 0.0):
                return
            self._next[group] = time.monotonic() + SAY_EVERY_S
            lost = self._lost.pop(group)
        log.warning(
            "events: %d aged out of the log before the group %r had acknowledged them; let it read more often, keep "
            "more (retention.json), or remove it ('vivace events drop')",
            lost,
            group,
        )
