"""``vivace why``."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any

import typer
from rich.table import Table

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
from vivace.cli.query import require_server, titles
from vivace.cli.runs import find_run
from vivace.cli.served import address_of, served_run
from vivace.cli.values import choice, json_object
from vivace.client import Explained, VivaceClient
from vivace.client_explain import explanation_of
from vivace.explain_contract import LANGUAGES
from vivace.run import Run
from vivace.running import running


def why(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    user: Annotated[str, typer.Option(help="whose stored history; or give --history")] = "",
    history: Annotated[list[str] | None, typer.Option(help="item ids, oldest first; may be repeated")] = None,
    top_k: Annotated[int, typer.Option(help="items that are explained", min=1, max=100)] = 5,
    text: Annotated[str, typer.Option(help="of a search, which is explained then")] = "",
    context: Annotated[
        Any, typer.Option(help="of the moment, as for 'vivace query'", parser=json_object, metavar="JSON")
    ] = "",
    language: Annotated[str, choice("--language", LANGUAGES, "of the sentences")] = "en",
    url: Annotated[str, typer.Option(help="host:port; without it the run's server, if one runs here")] = "",
    protocol: Protocol = "grpc",
    offline: Annotated[
        bool, typer.Option("--offline", help="by the newest version's graphs here, and more sets of events tried")
    ] = False,
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
) -> None:
    """Why each item is recommended: what of the request it hangs on, by asking the same graphs again without it; and
    the fewest events without which it would not be shown. Asks the running server, or without one the newest version's
    graphs."""
    if not user and not history and not text:
        raise typer.BadParameter("expected --user, --history or --text, whose answer is explained", param_hint="--user")
    if url and offline:
        raise typer.BadParameter("goes with a server; leave --offline out", param_hint="--url")
    run: Run | None = None if url and not name else find_run(artifacts, name)
    if offline or (not url and run is not None and not any(running(run))):
        assert run is not None
        explained = _offline(run, user, history or [], top_k, text, context, language)
    else:
        address = address_of(url, protocol, run)
        require_server(address, run)
        with VivaceClient(address, protocol, **credentials(key, tls_ca, tls_cert)) as client:
            if run is None:
                run, _ = served_run(client, address, artifacts)
            explained = client.explain(user, history or [], top_k, text, context=context or None, language=language)
    print_explained(run, explained)


def _offline(run: Run, user: str, history: list[str], top_k: int, text: str, context: Any, language: str) -> Explained:
    """By the graphs of the version that was published last."""
    import numpy as np

    from serving.runtime.paths import Paths
    from serving.runtime.pipeline import Pipeline
    from serving.runtime.ruled import Rules
    from serving.runtime.rules import rules_file
    from serving.runtime.stages import parse_row
    from serving.runtime.why import because, record, titled
    from vivace import contract
    from vivace.store.opening import store_of_worker

    with contextlib.closing(store_of_worker(run.feature_store, readonly=True)) as store:
        pipeline = Pipeline.published(run.root, store)
        events = np.array([item.encode() for item in history], object)
        sent, columns = json.dumps(context).encode() if context else b"", pipeline.transform.moment.columns
        row = parse_row(user.encode(), text.encode(), events, top_k, sent, columns)
        release = run.repository.resolve()
        response = release / contract.RESPONSE / str(run.version())
        rules, paths = Rules(rules_file(release), response, pipeline.respond), Paths.of(response, pipeline.respond)
        found, status = because(pipeline, row, rules=rules)
        items = titled(found)
        named = {item: title or "" for item, title in zip(items, store.titles(items), strict=True)}
        joined = [paths(of) if paths else None for of in found]
    heads = [head.name for head in run.schema().heads]
    records = [record(of, heads, named, language, path) for of, path in zip(found, joined, strict=True)]
    explanations = [explanation_of(of.item, of.score, r) for of, r in zip(found, records, strict=True)]
    return Explained(explanations, status)


def print_explained(run: Run | None, explained: Explained) -> None:
    """STATUS and a row an item: what it hangs on, and what joins it to that in the catalogue."""
    say(f"STATUS {explained.status}")
    if not explained.items:
        say("no item")
        return
    named = titles(run, [of.item for of in explained.items])
    table = Table(title="each item, its score, and what it hangs on", title_justify="left")
    shared = [of.path.get("sentence", "") for of in explained.items]
    for column in ("", "item", "score", "why", *(["in the catalogue"] if any(shared) else [])):
        table.add_column(column, justify="right" if column in ("", "score") else "left")
    for place, (of, title, joined) in enumerate(zip(explained.items, named, shared, strict=True), 1):
        path = [joined] if any(shared) else []
        table.add_row(str(place), f"{of.item} {title}".strip(), f"{of.score:.2f}", of.sentence, *path)
    console.print(table)
    say("each is what the same graphs answer to the request without it; nothing is estimated")
