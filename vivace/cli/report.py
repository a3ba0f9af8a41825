"""``vivace report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, reported, say


def report_compress(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    out: Annotated[Path | None, typer.Option(help="folder to write to; artifacts/<name>/report if empty")] = None,
    seconds: Annotated[float, typer.Option(help="of each of five measurements of an engine")] = 1.0,
    openvino: Annotated[bool, typer.Option(help="measure OpenVINO too")] = True,
) -> None:
    """Quality against latency of a run and its compressed variants: compress.html and compress.png."""
    from loadtest.reports.compress import report as run

    with reported():
        root = artifacts / name
        target = out or root / "report"
        with console.status("measuring"):
            run(root, target, seconds, openvino)
        say(f"wrote {target}/compress.html and compress.png")
