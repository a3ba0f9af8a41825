"""How soon the page of ``vivace ui`` is there, and how soon an edit of the history is answered and drawn.

    vivace serve --name shop
    python -m benchmarks.page artifacts/shop --out docs/benchmarks/page.json

Starts the page over the running server and Debian's Chromium without a window. First paint is the browser's own
(first-contentful-paint, of a context without a cache); "answered" is the first answer drawn, from the navigation on; an
edit counts from the click on an item to the frame that shows the new answer. The last line is one JSON object.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from loadtest.reports.record import record_line

LIMITS = {"first_paint_ms": 1000.0, "edit_ms": 150.0}
EDIT = """
() => new Promise((done) => {
  const began = performance.now();
  new MutationObserver((_, watcher) => {
    watcher.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
  }).observe(document.body, { attributes: true, attributeFilter: ["data-drawn"] });
  document.querySelector(".card [data-type]").click();
})
"""
PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0].startTime"


def measure(url: str, chromium: str, loads: int, edits: int) -> dict[str, list[float]]:
    """Milliseconds of each load and edit."""
    from playwright.sync_api import sync_playwright

    times: dict[str, list[float]] = {"first_paint_ms": [], "answered_ms": [], "edit_ms": []}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for number in range(loads + 1):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector(".card")
            if number:  # the first one starts the browser's processes
                times["answered_ms"].append(float(page.evaluate("performance.now()")))
                times["first_paint_ms"].append(float(page.evaluate(PAINT)))
            if number == loads:
                times["edit_ms"] = [float(page.evaluate(EDIT)) for _ in range(edits)]
            context.close()
        browser.close()
    return times


def summary(values: list[float]) -> dict[str, float]:
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(float(p50), 1), "p95": round(float(p95), 1), "max": round(max(values), 1), "n": len(values)}


def main(
    root: Annotated[Path, typer.Argument(help="the served run, artifacts/<name>")],
    url: Annotated[str, typer.Option(help="gRPC address of the server; of the run's server if empty")] = "",
    loads: Annotated[int, typer.Option(help="of the page", min=1)] = 20,
    edits: Annotated[int, typer.Option(help="of a history", min=1)] = 50,
    chromium: Annotated[str, typer.Option(help="the browser")] = "/usr/bin/chromium",
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """First paint, first answer and edits of the page over a running server."""
    command = [
        sys.executable, "-m", "vivace.cli.main", "ui", "--name", root.name, "--artifacts", str(root.parent), "--port",
        "0", *(["--url", url] if url else []),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
        assert page.stdout is not None
        try:
            address = next((m[0] for line in page.stdout if (m := re.search(r"http://\S+", line))), "")
            if not address:
                raise typer.BadParameter(f"{' '.join(command)}: did not start; is the server running?")
            times = measure(address, chromium, loads, edits)
        finally:
            page.terminate()
    record: dict[str, Any] = {name: summary(values) for name, values in times.items()}
    record |= {
        "load_average": round(os.getloadavg()[0], 1),
        "limits": LIMITS,
        "times": {name: [round(v, 1) for v in values] for name, values in times.items()},
    }
    line = record_line("page", **record)
    if out is not None:
        out.write_text(f"{line}\n")
    print(line)


if __name__ == "__main__":
    typer.run(main)
