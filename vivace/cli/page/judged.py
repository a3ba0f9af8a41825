"""The model's view: what evaluation, training, replay, compression and drift have left of a run, as they wrote it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from vivace.manifest import read_manifest
from vivace.run import EVALUATION, RANKING, RETRIEVAL, Run

METRICS, RANKS, NDCG, HR = "metrics.json", "ranks.npz", "NDCG@10", "HR@10"
DRAWS = 500  # of the bootstrap: a quarter of what that takes, as somebody waits


class Judged:
    """Of one run; None: nothing is known. For any number of threads."""

    def __init__(self, run: Run | None) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._table: tuple[str, list[dict[str, Any]]] | None = None

    def figures(self) -> dict[str, tuple[Path, str, str]]:
        """Of each drawing its file, what it shows, and the command that makes it."""
        if self._run is None:
            return {}
        evaluation, report = self._run.evaluation, self._run.root / "report"
        name = self._run.root.name
        return {
            "calibration": (
                evaluation / "reliability.png", "Calibration: how often what was promised came",
                f"vivace evaluate --name {name}",
            ),
            "replay": (
                evaluation / "replay.png", "Replay by hour: the log answered in order of time",
                f"vivace evaluate --name {name} --replay",
            ),
            "front": (
                report / "compress.png", "Quality against latency of the compressed variants",
                f"vivace report compress --name {name}",
            ),
        }  # fmt: skip

    def all(self) -> dict[str, Any]:
        """``table`` of methods with intervals, ``protocol``, ``curves`` of training by step, ``figures`` and what is
        ``missing`` with its command, ``drift`` of the running servers."""
        if self._run is None:
            raise ValueError("What models were judged by lies in the run's folder, which is not on this machine.")
        there = {name: shows for name, (path, shows, _) in self.figures().items() if path.exists()}
        missing = [
            {"what": shows, "command": command}
            for name, (_, shows, command) in self.figures().items()
            if name not in there
        ]
        if not self._run.has(EVALUATION):
            missing.insert(0, {"what": "Quality", "command": self._run.command(EVALUATION)})
        return {
            **self._quality(), "curves": {step: self._curve(step) for step in (RETRIEVAL, RANKING)}, "figures": there,
            "missing": missing, "drift": self._drift(),
        }  # fmt: skip

    def _quality(self) -> dict[str, Any]:
        assert self._run is not None
        if not self._run.has(EVALUATION):
            return {"table": [], "protocol": {}, "requests": 0}
        record = json.loads((self._run.evaluation / METRICS).read_text())
        return {"table": self._rows(record), "protocol": record["protocol"], "requests": record["requests"]}

    def _rows(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """HR@10, NDCG@10 and its 95 % interval over users of each method, as ``vivace evaluate --compare`` has them."""
        assert self._run is not None
        key = str(read_manifest(self._run.evaluation, self._run.command(EVALUATION))["key"])
        with self._lock:
            if self._table is None or self._table[0] != key:
                from training.intervals import bootstrap, ndcg_of

                with np.load(self._run.evaluation / RANKS) as ranks:
                    intervals = {method: bootstrap(ndcg_of(ranks[method]), DRAWS) for method in ranks}
                table = [
                    {
                        "method": method, "hr": values[HR], "ndcg": values[NDCG],
                        "interval": intervals.get(method),
                    }
                    for method, values in record["table"].items()
                ]  # fmt: skip
                self._table = key, table
            return self._table[1]

    def _curve(self, step: str) -> list[dict[str, float]]:
        """Each epoch's ``epoch``, ``loss`` and NDCG@10 of the validation requests."""
        assert self._run is not None
        if not self._run.has(step):
            return []
        return list(read_manifest(self._run.step(step), self._run.command(step))["results"].get("epochs", []))

    def _drift(self) -> list[dict[str, Any]]:
        """Features of the last hour of the first running server's versions."""
        from serving.control import running_servers
        from serving.wheel import ServerError

        assert self._run is not None
        try:
            reports = [report for server in running_servers(self._run) for report in server.drift(0)]
        except ServerError:
            return []
        return [{**feature, "version": report["version"]} for report in reports for feature in report["features"]]


def routes(judged: Judged, answered: Callable[[Callable[[], Any]], Response]) -> tuple[Route, ...]:
    def figure(request: Request) -> Response:
        path, _, command = judged.figures().get(request.path_params["name"], (Path(), "", ""))
        if not path.is_file():
            return JSONResponse({"error": f"no such figure; {command} makes it" if command else "no such figure"}, 404)
        return FileResponse(path)

    return (
        Route("/api/models", lambda request: answered(judged.all)),
        Route("/figures/{name}", figure),
    )
