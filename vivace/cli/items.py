"""``vivace items upsert``, ``vivace items remove`` and ``vivace forget``."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Key, Name, Protocol, TlsCa, TlsCert, credentials, say
from vivace.cli.query import require_server
from vivace.cli.runs import find_run, run_name
from vivace.cli.served import address_of, served_run
from vivace.client import VivaceClient, VivaceError
from vivace.contract import ITEM, STATUS_ERROR, STATUS_OK
from vivace.run import Run

items = typer.Typer(no_args_is_help=True)
SHOWN = 10  # reasons that are listed

File = Annotated[
    Path, typer.Argument(help="CSV, Parquet or JSON (a list, or an object a line)", exists=True, dir_okay=False)
]
MappingPath = Annotated[
    Path | None,
    typer.Option("--path", help="TOML mapping whose \\[items] names the columns; else they have the schema's names"),
]
Url = Annotated[str, typer.Option(help="host:port; without it where the run's server listens here")]


def require_server_of(run: Run) -> None:
    """Raises VivaceError where no server of ``run`` is up here: another run's would take what is meant for this one."""
    from serving.releases import in_use

    if not in_use(run.repository):
        name = run.root.name
        raise VivaceError(f"no server of {name} runs here; start one: vivace serve --name {name}, or give its --url")


def _run_to_change(name: str, artifacts: Path, url: str, protocol: str, access: dict[str, Any]) -> tuple[Run, str]:
    """The run by whose columns a file is read, and where it is served: the one called ``name``, else of what is served
    at ``url``, else the one prepared last. Raises VivaceError where nobody serves it."""
    if url and not name:
        require_server(url)
        with VivaceClient(url, protocol, **access) as client:
            served, why = served_run(client, url, artifacts)
        if served is None:
            raise VivaceError(f"{why}; say with --name by which run's columns the file is to be read")
        return find_run(artifacts, run_name(served, artifacts)), url
    run = find_run(artifacts, name)
    if not url:
        require_server_of(run)
    address = address_of(url, protocol, run)
    require_server(address, run)
    return run, address


def _report(what: str, statuses: list[str], rejected: Counter[str], began: float) -> None:
    """How many rows went well, and the reasons of the others."""
    seconds = max(time.monotonic() - began, 1e-9)
    good = sum(not status.startswith(STATUS_ERROR) for status in statuses)
    say(f"{what} {good:,} of {len(statuses) + sum(rejected.values()):,} rows in {seconds:.1f} s")
    reasons = rejected + Counter(status for status in statuses if status != STATUS_OK)
    for reason, count in reasons.most_common(SHOWN):
        say(f"{count:,}: {reason}")
    if len(reasons) > SHOWN:
        say(f"and {len(reasons) - SHOWN:,} other reasons")
    if good < len(statuses) + sum(rejected.values()):
        raise typer.Exit(1)


def _change(
    action: str, file: Path, path: Path | None, name: str, artifacts: Path, url: str, protocol: str,
    access: dict[str, Any],
) -> None:  # fmt: skip
    run, address = _run_to_change(name, artifacts, url, protocol, access)
    from preprocessing.item_file import ItemFile

    with tempfile.TemporaryDirectory() as folder:
        read = ItemFile(file, run.schema(), path, Path(folder) / "rejects.csv", ids_only=action == "removed")
    for reason, count in read.changed.most_common(SHOWN):
        say(f"{count:,}: {reason}")
    if read.left_out:
        say(f"columns that the catalogue does not have are left out: {', '.join(read.left_out)}")
    began = time.monotonic()
    with VivaceClient(address, protocol, **access) as client:
        if action == "removed":
            statuses = client.remove_items(row[ITEM] for row in read.rows)
        else:
            statuses = client.upsert_items(read.rows)
    _report(action, statuses, read.rejected, began)


@items.command(help="Put the rows of a file into the running server's catalogue, or in the place of those it has.")
def upsert(
    file: File, path: MappingPath = None, name: Name = "", artifacts: Artifacts = DEFAULT_ARTIFACTS, url: Url = "",
    protocol: Protocol = "grpc", key: Key = "", tls_ca: TlsCa = "", tls_cert: TlsCert = "",
) -> None:  # fmt: skip
    _change("stored", file, path, name, artifacts, url, protocol, credentials(key, tls_ca, tls_cert))


@items.command(help="Take the items of a file out: no later answer has them until they are put in again.")
def remove(
    file: File, path: MappingPath = None, name: Name = "", artifacts: Artifacts = DEFAULT_ARTIFACTS, url: Url = "",
    protocol: Protocol = "grpc", key: Key = "", tls_ca: TlsCa = "", tls_cert: TlsCert = "",
) -> None:  # fmt: skip
    _change("removed", file, path, name, artifacts, url, protocol, credentials(key, tls_ca, tls_cert))


def forget(
    user: Annotated[str, typer.Argument(help="user id, as the data writes it")],
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    url: Url = "",
    protocol: Protocol = "grpc",
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
) -> None:
    """Take a user out of the feature store (histories, live log, ids of events) and the log of impressions. Through the
    running server, or in the store itself where none runs; what a log of your own and artifacts/RUN/features hold of
    the user stays."""
    if not user:
        raise typer.BadParameter("expected a user id, got an empty text", param_hint="USER")
    run = None if url and not name else find_run(artifacts, name)
    address = address_of(url, protocol, run)
    if run is not None and not url:
        try:
            require_server_of(run)
            require_server(address, run)
        except VivaceError:
            say(_forgotten_in(run, user))
            return
    require_server(address, run)
    with VivaceClient(address, protocol, **credentials(key, tls_ca, tls_cert)) as client:
        if run is None:
            served_run(client, address, artifacts)
        say(f"{user}: {client.forget(user)}")


def _forgotten_in(run: Run, user: str) -> str:
    from vivace.impressions.files import forget as forget_shown
    from vivace.impressions.queue import folder_of
    from vivace.store.forgetting import compact
    from vivace.store.lmdb_store import LmdbStore
    from vivace.store.opening import STORE_URL, store_of_worker

    shown = forget_shown(folder_of(run.feature_store), user)
    log = f"; {shown} requests left the log of impressions" if shown else ""
    if os.environ.get(STORE_URL):
        with contextlib.closing(store_of_worker(run.feature_store)) as shared:
            return f"{user}: {shared.FORGOTTEN if shared.forget(user) else 'nothing was known of this user'}{log}"
    with contextlib.closing(LmdbStore(run.feature_store, create=False)) as store:
        known = store.forget(user)
    gone = compact(run.feature_store)
    where = "its bytes are gone from the file" if gone else "its bytes leave the file when nobody has it open"
    return f"{user}: {'forgotten' if known else 'nothing was known of this user'}; {where}{log}"
