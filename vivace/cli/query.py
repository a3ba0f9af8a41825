"""``vivace query``."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from vivace import contract
from vivace.cli.options import (
    DEFAULT_ARTIFACTS,
    Artifacts,
    Key,
    Name,
    Protocol,
    TlsCa,
    TlsCert,
    console,
    credentials,
    say,
)
from vivace.cli.runs import find_run, run_name, runs
from vivace.cli.served import address_of, served_run
from vivace.cli.values import json_object
from vivace.client import Recommendation, VivaceClient, VivaceError
from vivace.run import Run

SHOWN_EVENTS = 5
UNDERSTOOD = ("text", "corrected", "synonyms", "intents", "facets")  # of a query, in this order
ADVICE = {  # by words of a STATUS: what it means for who asked
    contract.STATUS_OK: "answered from all that was given",
    "popular items": "nothing is known to go by, so these are what most people take; give --history, or --user as the "
    "data writes it",
    "HISTORY items are not in the catalogue": "these ids were left out: check how the data writes them",
    "this run has no column": "these names of --context were left out: check how the data calls them",
    "no search": "the run cannot search, so --text was left out; 'vivace train --task search' and 'vivace compile' "
    "make it so",
    "no word to search for": "--text was left out",
}


def query(
    user: Annotated[str, typer.Option(help="user id; the history comes from the feature store")] = "",
    history: Annotated[
        list[str] | None, typer.Option(help="item id in place of the stored history; repeat it, oldest first")
    ] = None,
    top_k: Annotated[int, typer.Option(help="items to answer", min=1, max=contract.MAX_TOP_K)] = 10,
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    url: Annotated[str, typer.Option(help="host:port")] = "",
    protocol: Protocol = "grpc",
    append: Annotated[str, typer.Option(help="first add this item to --user's history", metavar="ITEM")] = "",
    event_type: Annotated[str, typer.Option(help="of --append, as the data names it, such as click")] = "",
    context: Annotated[
        Any,
        typer.Option(
            help='what is known of the moment, by the data\'s columns, such as {"device": "phone"}; of --append too',
            parser=json_object,
            metavar="JSON",
        ),
    ] = "",
    text: Annotated[str, typer.Option(help="search for this; needs a run with search")] = "",
    filters: Annotated[
        Any,
        typer.Option(
            help='of --text: {"values": {"brand": ["Alto"]}, "ranges": {"price": [5, null]}, "seen": false}',
            parser=json_object,
            metavar="JSON",
        ),
    ] = "",
    diversity: Annotated[
        float, typer.Option(help="of --text: 0 by score, 1 as unlike each other as can be", min=0, max=1)
    ] = 0.0,
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
) -> None:
    """Ask the running server and print ids and titles; with --text what it understood and which branches found each
    item."""
    for flag, value, needed, present in (
        ("--append", append, "--user", user), ("--event-type", event_type, "--append", append),
        ("--filters", filters, "--text", text), ("--diversity", diversity, "--text", text),
    ):  # fmt: skip
        if value and not present:
            raise typer.BadParameter(f"goes with {needed}", param_hint=flag)
    there = runs(artifacts)  # of several nobody knows which is meant at another address
    run = find_run(artifacts, name) if name else there[0] if len(there) == 1 or (there and not url) else None
    address = address_of(url, protocol, run)
    require_server(address, run)
    with VivaceClient(address, protocol, **credentials(key, tls_ca, tls_cert)) as client:
        if not name:
            run, _ = served_run(client, address, artifacts)
        if append:
            appended = client.append(user, append, event_type, context=context or None)
            status = getattr(appended, "status", "")
            say(f"{user}: history now has {appended} events" + (f"; STATUS {status}" if status else ""))
        try:
            answer = client.recommend(
                user, history or [], top_k, text, filters=filters, diversity=diversity, context=context or None
            )
        except VivaceError as error:
            hint = f"; is {address} the port of {protocol}?" if "failed to connect" in str(error) else ""
            raise VivaceError(f"{error}{hint}") from None
    print_answer(run, user, history or [], answer)


def require_server(url: str, run: Run | None = None) -> None:
    """Raises VivaceError that names the command to run where nobody listens at host:port."""
    host, _, port = url.rpartition(":")
    if not host or not port.isdigit() or "/" in url:
        raise typer.BadParameter(f"expected host:port such as 127.0.0.1:8001, got {url!r}", param_hint="--url")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        name = f" --name {run_name(run, run.root.parent)}" if run else ""
        raise VivaceError(f"no server answers at {url} ({error}); start one: vivace serve{name}") from None


def explained(status: str) -> str:
    """What a STATUS means and what to do about it; "" where its own words say it."""
    return "; ".join(advice for words, advice in ADVICE.items() if words in status)


def titles(run: Run | None, items: Sequence[str]) -> list[str]:
    """Titles from the feature store; "" where there is none."""
    from vivace.store.opening import store_of_worker

    if run is None or not run.feature_store.is_dir():
        return [""] * len(items)
    with contextlib.closing(store_of_worker(run.feature_store, readonly=True)) as store:
        return [title or "" for title in store.titles(items)]


def stored_history(run: Run | None, user: str) -> list[str]:
    """What the feature store has of a user, oldest first."""
    from vivace.store.opening import store_of_worker

    if run is None or not user or not run.feature_store.is_dir():
        return []
    with contextlib.closing(store_of_worker(run.feature_store, readonly=True)) as store:
        return list(store.histories([user])[0] or [])


def print_answer(run: Run | None, user: str, history: list[str], answer: Recommendation) -> None:
    """STATUS, the newest of the history, what a query was taken for, and a row an item."""
    advice = explained(answer.status)
    say(f"user {user or '(anonymous)'}, STATUS {answer.status}" + (f" ({advice})" if advice else ""))
    events = history or stored_history(run, user)
    newest = events[-SHOWN_EVENTS:]
    if events:
        shown = (f"{item} {title}".rstrip() for item, title in zip(newest, titles(run, newest), strict=True))
        say(f"history of {len(events)}, newest last: {'; '.join(shown)}")
    understood = {key: value for key in UNDERSTOOD if (value := answer.understood.get(key))}
    if understood:
        say(f"understood {json.dumps(understood, ensure_ascii=False)}")
    if answer.items:
        console.print(answer_table(answer, titles(run, answer.items)))
    else:
        say("no item")


def answer_table(answer: Recommendation, names: Sequence[str]) -> Table:
    """A row an item, best first; columns that would be empty are left out."""
    branches = answer.understood.get("found_by", {})
    table = Table()
    table.add_column("", justify="right")
    table.add_column("item")
    columns: list[tuple[str, list[str]]] = []
    if any(names):
        columns.append(("title", list(names)))
    columns.append(("score", [f"{score:.2f}" for score in answer.scores]))
    columns += [(f"P({head})", [f"{p:.3f}" for p in values]) for head, values in answer.heads.items()]
    if branches:
        columns.append(("found by", [", ".join(branches.get(item, [])) for item in answer.items]))
    for title, _ in columns:
        table.add_column(title, justify="left" if title in ("title", "found by") else "right")
    for row, item in enumerate(answer.items):
        table.add_row(str(row + 1), item, *(values[row] for _, values in columns))
    return table
