"""Where a run is served, and which run a call without ``--name`` is about: what the server says that it serves."""

from __future__ import annotations

from pathlib import Path

from vivace.cli.options import say
from vivace.cli.runs import run_name, runs
from vivace.client import VivaceClient, VivaceError
from vivace.contract import DATA
from vivace.run import Run
from vivace.running import running


def _of_data(run: Run, data: str) -> bool:
    try:
        return run.schema().name == data
    except FileNotFoundError:  # a repository that came alone
        return False


def address_of(url: str, protocol: str, run: Run | None = None) -> str:
    """host:port to ask: ``url``, else where the server of ``run`` says it listens, else the usual port here."""
    here = [] if url or run is None else [server.address(protocol) for server in running(run)]
    return url or next(filter(None, here), "127.0.0.1:8001" if protocol == "grpc" else "127.0.0.1:8000")


def served_run(client: VivaceClient, address: str, artifacts: Path) -> tuple[Run | None, str]:
    """(the run of the data set that the server at ``address`` says it serves, why there is none: not exactly one is
    here). Says what is served, and by which run it is read."""
    try:
        data = client.about().get(DATA, "")
    except VivaceError as error:
        say(f"server at {address}: it does not say what it serves ({error})")
        return None, f"the server at {address} does not say what it serves"
    if not data:
        say(f"server at {address}: compiled by a version that does not say which data it serves")
        return None, f"the server at {address} does not say which data it serves"
    present = [run for run in runs(artifacts) if _of_data(run, data)]
    names = [run_name(run, artifacts) for run in present]
    read = f", read as run {names[0]}" if len(names) == 1 else ""
    say(f"server at {address}: data set {data}{read}")
    if len(present) == 1:
        return present[0], ""
    here = f"of which there are several runs in {artifacts}: {', '.join(names)}" if names else f"not in {artifacts}"
    return None, f"the server at {address} serves the data set {data}, {here}"
