"""``vivace events``: the log of live events, read by several workers that share it."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, errors, say
from vivace.cli.runs import find_run
from vivace.store.interface import StoreUnreachableError
from vivace.store.opening import STORE_URL, open_store

if TYPE_CHECKING:
    from vivace.store.interface import Delivery, ServingStore

LOOK_EVERY_S = 10.0  # for events that were missed

events = typer.Typer(no_args_is_help=True)
Store = Annotated[
    str,
    typer.Option(
        "--store", envvar=STORE_URL, show_default=False, metavar="URL",
        help="a Valkey that servers share, such as valkey://127.0.0.1:6379/0; without it the run's own store",
    ),
]  # fmt: skip


@contextlib.contextmanager
def _opened(name: str, artifacts: Any, url: str) -> Iterator[ServingStore]:
    if url:
        from vivace.store.remote.store import ValkeyStore

        store: ServingStore = ValkeyStore(url)
    else:
        store = open_store(find_run(artifacts, name).feature_store)
    with contextlib.closing(store):
        yield store


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """The signals that have come and ask to stop; a batch in hand is written and acknowledged first. The second one
    does not wait for that."""
    came: list[int] = []

    def ask(number: int, _: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reader_gone() -> bool:
    """Whether whoever reads standard output through a pipe has closed it: there may be no event for hours whose
    writing would tell."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # not a file of the system's
        return False
    poll = select.poll()
    poll.register(output, 0)  # errors alone, which need not be asked for
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _say_missed(store: ServingStore, group: str, said: int) -> int:
    """Says how many events the group has missed, where they are more than were ``said``; how many."""
    try:
        missed = next((state.missed for state in store.groups() if state.name == group), 0)
    except StoreUnreachableError:  # who follows waits for it
        return said
    if missed > said:
        errors.print(f"vivace: {missed} events aged out before the group {group!r} had acknowledged them")
    return missed


def as_line(delivery: Delivery) -> str:
    """One event as JSON, with the number by which one that comes again is known."""
    event = delivery.event
    columns = {
        "number": delivery.number, "times": delivery.times, "user_id": event.user_id, "item_id": event.item_id,
        "event_type": event.event_type, "timestamp_ms": event.timestamp_ms, "shown": event.shown,
        "context": json.loads(event.context) if event.context else {}, "request_id": event.request_id,
    }  # fmt: skip
    return json.dumps(columns, ensure_ascii=False)


@events.command(
    help="Write live events to standard output as they come, a line of JSON each. Several that name the same --group "
    "share them; each event is acknowledged when it is written, and comes again to another of the group where its "
    "reader died before: at least once. 'number' tells one that came before. Ctrl-C, SIGTERM or a closed pipe ends it."
)
def follow(
    group: Annotated[str, typer.Option("--group", help="of readers that share the events; made where it is new")],
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    store: Store = "",
    consumer: Annotated[str, typer.Option("--consumer", help="this reader's name; by host and process if empty")] = "",
    from_start: Annotated[
        bool, typer.Option("--from-start", help="a new group begins with the oldest event, not with the next one")
    ] = False,
    most: Annotated[int, typer.Option("--batch", min=1, max=10_000, help="events that are in hand at once")] = 500,
    idle_s: Annotated[
        float, typer.Option("--idle", min=1.0, help="seconds after which what is not acknowledged goes to another")
    ] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="end where there is nothing more")] = False,
) -> None:
    from vivace.store.event_groups import follow as followed

    missed, look_s = 0, 0.0
    with _stopped_by_signals() as stop, _opened(name, artifacts, store) as opened:
        begin = 0 if from_start else None
        if from_start and any(state.name == group for state in opened.groups()):
            errors.print(
                f"vivace: the group {group!r} is there and goes on where it is; 'vivace events drop' removes it"
            )
        for batch in followed(
            opened,
            group,
            consumer,
            after=begin,
            most=most,
            idle_s=idle_s,
            stop=lambda: bool(stop) or _reader_gone(),
            once=once,
        ):
            sys.stdout.buffer.write("".join(f"{as_line(delivery)}\n" for delivery in batch).encode())
            sys.stdout.buffer.flush()
            if time.monotonic() >= look_s:  # counting may take a while
                look_s, missed = time.monotonic() + LOOK_EVERY_S, _say_missed(opened, group, missed)


@events.command(help="How far each group of readers is.")
def groups(name: Name = "", artifacts: Artifacts = DEFAULT_ARTIFACTS, store: Store = "") -> None:
    from rich.table import Table

    with _opened(name, artifacts, store) as opened:
        states = opened.groups()
    if not states:
        say("no group reads the events; 'vivace events follow --group NAME' makes one")
        return
    table = Table("group", "newest handed out", "not acknowledged", "to come", "missed", box=None)
    for state in states:
        table.add_row(state.name, *(f"{n:,}" for n in (state.delivered, state.open, state.ahead, state.missed)))
    console.print(table)


@events.command(help="Remove a group of readers: what it has not read, nobody reads for it.")
def drop(
    group: Annotated[str, typer.Argument(help="its name")],
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    store: Store = "",
) -> None:
    with _opened(name, artifacts, store) as opened:
        if not opened.drop_group(group):
            there = ", ".join(state.name for state in opened.groups()) or "none"
            raise typer.BadParameter(f"expected a group there is ({there}), got {group!r}", param_hint="GROUP")
    say(f"group {group!r} removed")
