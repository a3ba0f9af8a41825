"""``vivace publish``, ``rollback`` and ``versions``: which version of a run is served; ``vivace scale``: how often."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, say
from vivace.cli.runs import find_run, run_name, say_next
from vivace.manifest import exclusive
from vivace.run import Run

REFUSED = ": refused, as"  # in the words of a server that has judged a version
KEEP = "from now on so many versions before the newest stay on disk; others that nobody needs are removed"
LEAST_HELP = (
    "times the served version's NDCG@10 on the recorded validation requests that a newer one must have; 0: any quality"
)
LeastQuality = Annotated[float, typer.Option(help=LEAST_HELP, metavar="SHARE", min=0, max=1)]
Keep = Annotated[int | None, typer.Option(help=KEEP, metavar="N", min=1, show_default="as before, at first 1")]


def publish(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    to: Annotated[int, typer.Option(help="version (0: the newest)", min=0)] = 0,
    keep: Keep = None,
    least_quality: LeastQuality = 0.67,
) -> None:
    """Serve a version: the running servers of the run take it without a refused request, and servers that start later
    too. Where one of them does not come up with it, answers otherwise than whole, is far slower, or finds what users
    took next clearly worse, all stay as they are."""
    run = find_run(artifacts, name)
    release = release_of(run, to)
    serve_version(run, release, artifacts, least_quality=least_quality)
    if keep is not None:
        keep_versions(run, keep)


def keep_versions(run: Run, count: int) -> None:
    """Removes old versions, and says so. Raises ValueError for none to keep."""
    from serving.releases import keep, releases, version_of

    with exclusive(run.root):
        removed = keep(run.repository, count)
    there = ", ".join(str(version_of(release)) for release in releases(run.repository))
    say(f"removed versions: {', '.join(map(str, removed)) or 'none'}; on disk: {there}")


def rollback(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    to: Annotated[int, typer.Option(help="version (0: the one before what is served)", min=0)] = 0,
) -> None:
    """Serve an earlier version again: see 'vivace publish'."""
    from serving.control import running_servers
    from serving.releases import gone_back_to, version_of

    run = find_run(artifacts, name)
    if not to:
        servers = running_servers(run)
        current = int(servers[0].state["version"]) if servers else version_of(run.repository.resolve())
        to = gone_back_to(run.repository, current)
        if not to:
            raise ValueError(f"rollback: no version before {current} is kept; nothing to go back to")
    serve_version(run, release_of(run, to), artifacts)


def versions(name: Name = "", artifacts: Artifacts = DEFAULT_ARTIFACTS, keep: Keep = None) -> None:
    """The versions that are kept: when and from what they were made, how well they rank, who serves them."""
    from serving.control import running_servers
    from serving.releases import CHECKSUMS, card_of, releases, version_of

    run = find_run(artifacts, name)
    _check_published(run)
    if keep is not None:
        keep_versions(run, keep)
    servers, chosen = running_servers(run), version_of(run.repository.resolve())
    table = Table(title=f"versions of {run_name(run, artifacts)}", title_justify="left")
    for column in ("version", "made", "trained at", "precision", "NDCG@10", "served by", "at a start"):
        table.add_column(column, justify="right" if column in ("version", "NDCG@10") else "left")
    for release in releases(run.repository):
        number, card = version_of(release), card_of(release)
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime((release / CHECKSUMS).stat().st_mtime))
        by = ", ".join(words for s in servers if (words := _serves(s.pid, s.state, number)))
        table.add_row(
            str(number), made, str(card.get("ranking", {}).get("commit", ""))[:8], str(card.get("precision", "")),
            ndcg_of(card), by, "yes" if number == chosen else "",
        )  # fmt: skip
    console.print(table)


def scale(
    replicas: Annotated[int, typer.Argument(help="servers behind the one guard", min=1, max=16)],
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
) -> None:
    """Have the running server of a run be so many replicas, without a refused request."""
    from serving.control import running_servers

    run = find_run(artifacts, name)
    servers = running_servers(run)
    if not servers:
        name = run_name(run, artifacts)
        start = f"vivace serve --name {name} --replicas {replicas}"
        raise FileNotFoundError(f"no running server of {name} is known here; '{start}' starts one")
    for server in servers:
        server.scale(replicas, say)
        say(f"process {server.pid}: {replicas} replica{'s' * (replicas > 1)}")


def serve_version(
    run: Run, release: Path, artifacts: Path, before: Path | None = None, least_quality: float = 0.0
) -> None:
    """Has all servers of the run serve ``release``, and those that start later, if its NDCG@10 on recorded requests is
    ``least_quality`` times that of what they serve. Raises ServerError with the reason where one does not; then the
    others go back to what they had, and servers that start later get ``before``, where the release is in use
    already."""
    from serving.control import running_servers
    from serving.releases import put_in_use, refusals, remember_refused, remember_served, verify, version_of
    from serving.wheel import ServerError

    verify(release)
    moved = []
    servers = running_servers(run)
    served = int(servers[0].state["version"]) if servers else version_of((before or run.repository).resolve())
    for server in servers:
        try:
            server.serve(version_of(release), say, least_quality)
            moved.append(server)
        except KeyboardInterrupt:
            say(f"server {server.pid} goes on with the change; give the command again to see its end and to keep it")
            raise
        except ServerError as error:
            if REFUSED in str(error):  # and not that a trial is under way
                remember_refused(version_of(release), run.repository, str(error))
            for earlier in moved:
                earlier.serve(int(earlier.state["version"]), say)
            if before is not None:
                put_in_use(before, run.repository)
            raise
    put_in_use(release, run.repository)
    remember_served(version_of(release), run.repository, served)
    if version_of(release) in refusals(run.repository):
        remember_refused(version_of(release), run.repository, "")
    count = f"{len(servers)} running server{'s' * (len(servers) > 1)}"
    where = count if servers else "no running server of this run is known here"
    say(f"version {version_of(release)}: {where}; servers that start from now on serve it")
    if not servers:
        say_next("serve", run, artifacts)


def release_of(run: Run, version: int) -> Path:
    """Folder of a published version (0: the newest). Raises ValueError that names those there are."""
    from serving.releases import releases, version_of

    _check_published(run)
    there = {version_of(release): release for release in releases(run.repository)}
    if version and version not in there:
        raise ValueError(f"--to {version}: expected one of {', '.join(map(str, there))}")
    return there[version or max(there)]


def _check_published(run: Run) -> None:
    if not run.repository.is_symlink():
        raise FileNotFoundError(f"{run.root.name}: no version yet; run 'vivace compile --name {run.root.name}' first")


def _serves(pid: int, state: dict[str, Any], version: int) -> str:
    """How a running server serves a version, in words; "" where it does not."""
    trial = state.get("rollout")
    if trial and trial["version"] == version and not trial["result"]:
        return f"process {pid}, {100 * trial['share']:.4g} % of the users"
    return f"process {pid}" if state["version"] == version else ""


def ndcg_of(card: dict[str, Any]) -> str:
    """Of the model card's evaluation: the last row of its table, which is what is served."""
    quality = card.get("quality")
    rows = quality.get("table", {}) if isinstance(quality, dict) else {}
    values = [row["NDCG@10"] for row in rows.values() if "NDCG@10" in row]
    return f"{values[-1]:.4f}" if values else ""
