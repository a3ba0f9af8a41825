"""``vivace query``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, reported, say


def query(
    user: Annotated[str, typer.Option(help="user id; the history comes from the feature store")] = "",
    history: Annotated[str, typer.Option(help="item ids, oldest first, separated by commas")] = "",
    top_k: int = 10,
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    url: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:8001",
    protocol: Annotated[str, typer.Option(help="grpc or http")] = "grpc",
    append: Annotated[str, typer.Option(help="first add this item to the user's history")] = "",
    text: Annotated[str, typer.Option(help="search for this; needs a run with search")] = "",
    filters: Annotated[
        str, typer.Option(help='{"values": {"brand": ["Alto"]}, "ranges": {"price": [5, null]}, "seen": false}')
    ] = "",
    diversity: Annotated[float, typer.Option(help="of --text: 0 by score, 1 as unlike each other as can be")] = 0.0,
) -> None:
    """Ask the running server and print titles; with --text what it understood and which branches found each item."""
    from vivace.client import VivaceClient

    with reported(), VivaceClient(url, protocol) as client:
        if append:
            say(f"{user}: history now has {client.append(user, append)} events")
        items = [i for i in history.split(",") if i]
        wanted = json.loads(filters) if filters else None
        answer = client.recommend(user, items, top_k, text, filters=wanted, diversity=diversity)
        print_answer(artifacts / name, user, items, answer)


def titles(root: Path, items: list[str]) -> list[str]:
    """Titles from the feature store; the id where there is none."""
    from vivace.store.lmdb_store import LmdbStore

    with contextlib.closing(LmdbStore(root / "feature_store", readonly=True)) as store:
        return [t or i for t, i in zip(store.titles(items), items, strict=True)]


def print_answer(root: Path, user: str, history: list[str], answer: Any) -> None:
    """History titles and recommended titles side by side with scores."""
    from vivace.store.lmdb_store import LmdbStore

    with contextlib.closing(LmdbStore(root / "feature_store", readonly=True)) as store:
        known = history or (store.histories([user])[0] if user else None) or []
    past, found = titles(root, known[-5:]), titles(root, answer.items)
    table = Table(title=f"user {user or '(anonymous)'}, STATUS {answer.status}", title_justify="left")
    table.add_column("last in the history")
    table.add_column("recommended")
    table.add_column("score", justify="right")
    for head in answer.heads:
        table.add_column(f"P({head})", justify="right")
    if answer.understood:
        shown = {k: answer.understood[k] for k in ("text", "corrected", "synonyms", "intents", "facets")}
        console.print(json.dumps(shown, ensure_ascii=False), highlight=False)
        table.add_column("found by")
    found_by = answer.understood.get("found_by", {})
    for i in range(max(len(past), len(found))):
        got = i < len(found)
        table.add_row(
            past[i] if i < len(past) else "",
            found[i] if got else "",
            f"{answer.scores[i]:.2f}" if got else "",
            *(f"{p[i]:.3f}" if got else "" for p in answer.heads.values()),
            *([", ".join(found_by.get(answer.items[i], [])) if got else ""] if answer.understood else []),
        )
    console.print(table)
