"""``vivace report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, say
from vivace.cli.runs import find_run


def report_compress(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    out: Annotated[
        Path | None, typer.Option(help="folder to write to; artifacts/RUN/report if empty", file_okay=False)
    ] = None,
    seconds: Annotated[float, typer.Option(help="of each of five measurements of an engine", min=0.01)] = 1.0,
    openvino: Annotated[bool, typer.Option(help="measure OpenVINO too")] = True,
) -> None:
    """Quality against latency of a run and its compressed variants: compress.html and compress.png."""
    run = find_run(artifacts, name)
    from loadtest.reports.compress import report

    folder = out or run.root / "report"
    with console.status("measuring"):
        report(run.root, folder, seconds, openvino)
    say(f"wrote {folder}/compress.html and compress.png")
