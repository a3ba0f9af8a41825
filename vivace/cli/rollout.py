"""``vivace rollout``: a share of the users gets another version, step by step, before everyone does."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, say
from vivace.cli.publish import LeastQuality, release_of
from vivace.cli.runs import find_run, run_name
from vivace.cli.values import duration, percentages
from vivace.run import Run

rollout = typer.Typer(no_args_is_help=True)
CANARY = "of the users; several by commas: one step each; 0 first: copies alone (--shadow)"


@rollout.command(help="Put a version on trial: the running servers of the run send it a share of the users.")
def start(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    to: Annotated[int, typer.Option(help="version (0: the newest)", min=0)] = 0,
    canary: Annotated[Any, typer.Option(parser=percentages, metavar="PERCENT", help=CANARY)] = "5",
    wait: Annotated[str, typer.Option(parser=duration, metavar="T", help="how long a step lasts, as 10m")] = "10m",
    promote: Annotated[bool, typer.Option("--promote", help="then serve it to everyone; else that waits")] = False,
    shadow: Annotated[
        float, typer.Option(help="per cent of other calls of which it gets a copy", min=0, max=100)
    ] = 0.0,
    interleave: Annotated[
        bool,
        typer.Option(
            "--interleave", help="its users get drafts of both versions' rankings, for 'vivace experiment report'"
        ),
    ] = False,
    salt: Annotated[str, typer.Option(help="deals the users: 1 to 40 letters, digits, _ or - (none: by chance)")] = "",
    drift: Annotated[
        float, typer.Option(help="spreads by which its median score may lie off the served one's (0: any)", min=0)
    ] = 3.0,
    slower: Annotated[float, typer.Option(help="times the served one's mean time that a call may take", min=1)] = 1.5,
    least_quality: LeastQuality = 0.67,
) -> None:
    from serving.control import running_servers
    from serving.judgement import Plan
    from serving.releases import verify, version_of
    from serving.wheel import ServerError

    run = find_run(artifacts, name)
    release = release_of(run, to)
    verify(release)
    salt = salt or f"v{version_of(release)}-{secrets.token_hex(4)}"
    plan = Plan(
        version=version_of(release), salt=salt, shares=canary, wait_s=float(wait), promote=promote,
        shadow=shadow / 100, slower=slower, interleave=interleave, drift=drift, least_quality=least_quality,
    )  # fmt: skip
    began: list[Any] = []
    for server in _running(run, artifacts, running_servers(run)):
        try:
            with _goes_on(server):
                server.rollout(plan, say)
            began.append(server)
        except ServerError:
            for earlier in began:
                earlier.withdraw(say)
            raise
    say(f"next: vivace rollout status --name {run_name(run, artifacts)}")


@rollout.command(help="Who gets which version, and how both do.")
def status(name: Name = "", artifacts: Artifacts = DEFAULT_ARTIFACTS) -> None:
    from serving.control import running_servers

    run = find_run(artifacts, name)
    for server in _running(run, artifacts, running_servers(run)):
        state = server.state.get("rollout")
        if not state:
            say(f"process {server.pid}: serves version {server.state['version']}; no version is on trial")
            continue
        console.print(_table(server.pid, server.state["version"], state))
        for line in _compared(state["compared"], state["interleave"]):
            say(line)
        for line in state["lines"]:
            say(line)


@rollout.command(help="Serve the version on trial to everyone, without a refused request.")
def promote(name: Name = "", artifacts: Artifacts = DEFAULT_ARTIFACTS) -> None:
    from serving.control import running_servers

    run = find_run(artifacts, name)
    for server in _running(run, artifacts, running_servers(run)):
        with _goes_on(server):
            server.promote(say)
        say(f"process {server.pid}: version {server.state['rollout']['version']} is served to everyone")


@rollout.command(help="End the trial: its users get the served version again, without a refused request.")
def stop(name: Name = "", artifacts: Artifacts = DEFAULT_ARTIFACTS) -> None:
    from serving.control import running_servers

    run = find_run(artifacts, name)
    for server in _running(run, artifacts, running_servers(run)):
        with _goes_on(server):
            server.withdraw(say)
        say(f"process {server.pid}: everyone gets version {server.state['version']}")


@contextlib.contextmanager
def _goes_on(server: Any) -> Iterator[None]:
    """Ctrl-C ends the command, not what the server was told."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"server {server.pid} goes on with it; 'vivace rollout status' shows how far it is")
        raise


def _running(run: Run, artifacts: Any, servers: list[Any]) -> list[Any]:
    if not servers:
        name = run_name(run, artifacts)
        raise FileNotFoundError(f"no running server of {name} is known here; 'vivace serve --name {name}' starts one")
    return servers


def _table(pid: int, served: int, state: dict[str, Any]) -> Table:
    """Of the last ``window_s`` seconds, both versions side by side."""
    over = state["result"]
    drafts = ", drafts of both" if state["interleave"] else ""
    share = "none" if over else f"{100 * state['share']:.4g} % (step {state['step']} of {state['steps']}){drafts}"
    title = f"process {pid}, the last {state['window_s']:.0f} s"
    table = Table(title=title, title_justify="left")
    for column in ("version", "users", "calls", "failed", "mean ms", "not whole"):
        table.add_column(column, justify="left" if column == "users" else "right")
    rest = "all" if over else f"{100 * (1 - state['share']):.4g} %"
    for version, users, side in ((served, rest, "served"), (state["version"], share, "trial")):
        seen = state[side]
        partial = seen["partial"] / seen["rows"] if seen["rows"] else 0.0
        table.add_row(
            str(version), users, f"{seen['calls']:.0f}", f"{seen['failed']:.0f}", f"{seen['mean_ms']:.1f}",
            f"{partial:.1%}",
        )  # fmt: skip
    return table


def _compared(seen: dict[str, Any], interleaved: bool) -> list[str]:
    """What the answers and clicks of both say, the served version first; what nothing is known of is left out."""
    if not seen:
        return []
    served, trial, copies, clicks = seen["served"], seen["trial"], seen["copies"], seen["clicks"]
    lines = [
        f"last answers of {served['users']:,} and {trial['users']:,} users: empty {served['empty']:,} and "
        f"{trial['empty']:,}"
    ]
    if all(math.isfinite(value) for value in (served["score"], trial["score"], seen["score_shift"])):
        lines[0] += (
            f"; median score of the first item {served['score']:.4g} and {trial['score']:.4g} "
            f"({seen['score_shift']:+.2f} spreads, PSI {seen['score_psi']:.3f})"
        )
    if copies["compared"]:
        lines.append(
            f"{copies['compared']:,} requests answered by both: {copies['overlap']:.1%} of the first ten items alike, "
            f"score {copies['moved']:+.2f} spreads, {copies['served_ms']:.1f} and {copies['tried_ms']:.1f} ms"
        )
    won = seen["preference"]
    if interleaved and math.isfinite(won["share"]):
        lines.append(f"won {won['share']:.1%} ({won['low']:.1%} to {won['high']:.1%}): {won['verdict']}")
    if not interleaved and math.isfinite(clicks["lift"]):
        lines.append(
            f"clicks a shown item {clicks['served']:.4f} and {clicks['trial']:.4f}: {clicks['lift']:+.1%} "
            f"({clicks['low']:+.1%} to {clicks['high']:+.1%}), {clicks['verdict']}"
        )
    return lines
