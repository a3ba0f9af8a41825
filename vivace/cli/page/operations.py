"""The operator's view: what the server's metrics say of the last second, its health and versions, and rollouts."""

from __future__ import annotations

import hmac
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import typer

from loadtest.reports.record import finite
from vivace import contract
from vivace.cli.page.served import AwayError, Served
from vivace.credentials import Credentials
from vivace.http_pool import HttpPool
from vivace.run import Run
from vivace.running import running

ASK_S = 3.0
SCALES_US = {"queue": "nv_inference_queue_duration_us", "compute": "nv_inference_compute_infer_duration_us"}
QUANTILES = {"0.5": "p50", "0.95": "p95", "0.99": "p99"}
ANSWERS, CACHE = "vivace_answers", "vivace_answer_cache"
Ports = tuple[str, str]  # host:port of metrics and of health
Samples = dict[tuple[str, str], float]  # (metric, model or how) and its sum over the other labels

ORDER = (contract.FEATURE_TRANSFORM, contract.RETRIEVAL, contract.RANKING, contract.QUERY_SEARCH, contract.RESPONSE,
         contract.ENSEMBLE)  # fmt: skip


class ForbiddenError(ValueError):
    """The operator's key is missing or wrong."""


def read_metrics(text: str) -> Samples:
    """Samples by metric, without "_total" and with a quantile behind it, and by its label ``model``, ``how`` or
    ``result``; those of replicas and versions are added up."""
    from prometheus_client.parser import text_string_to_metric_families

    samples: Samples = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if "reason" in labels:
                continue
            of = next((labels[name] for name in ("model", "how", "result") if name in labels), "")
            quantile = labels.get("quantile", "")
            samples[(f"{sample.name.removesuffix('_total')} {quantile}".strip(), of)] += sample.value
    return samples


def between(before: Samples, after: Samples, seconds: float) -> dict[str, Any]:
    """What happened between two samples: ``stages``, each with requests a second, mean batch and milliseconds of a
    request in the queue and at work; ``rate`` and ``mean_ms`` of the whole call; ``answers`` by how they were made."""

    def grown(metric: str, of: str) -> float:
        return max(0.0, after.get((metric, of), 0.0) - before.get((metric, of), 0.0))

    models = {of for metric, of in after if metric == "nv_inference_count"}
    stages = []
    for model in sorted(models, key=lambda m: ORDER.index(m) if m in ORDER else len(ORDER)):
        requests = grown("nv_inference_count", model)
        runs = grown("nv_inference_exec_count", model)
        times = {k: grown(metric, model) / 1000 / requests if requests else 0.0 for k, metric in SCALES_US.items()}
        stages.append(
            {
                "model": model, "rate": requests / seconds, "batch": requests / runs if runs else 0.0,
                "pending": after.get(("nv_inference_pending_request_count", model), 0.0), **times,
            }
        )  # fmt: skip
    calls = grown("nv_inference_count", contract.ENSEMBLE)
    spent = grown("nv_inference_request_duration_us", contract.ENSEMBLE) / 1000
    quantiles = {
        short: after[(f"nv_inference_request_summary_us {q}", contract.ENSEMBLE)] / 1000
        for q, short in QUANTILES.items()
        if (f"nv_inference_request_summary_us {q}", contract.ENSEMBLE) in after
    }
    hows = {of for metric, of in after if metric == ANSWERS}
    caches = {of: grown(CACHE, of) / seconds for metric, of in after if metric == CACHE}
    return {
        "stages": stages,
        "rate": calls / seconds, "mean_ms": spent / calls if calls else 0.0, **quantiles,
        "answers": {how: grown(ANSWERS, how) / seconds for how in sorted(hows)},
        "caches": caches,
    }  # fmt: skip


def ports_of(run: Run | None, served: Served, metrics: str = "", status: str = "") -> Ports:
    """host:port of metrics and of health: as given, as the run's server says, or the usual ones beside its calls."""
    state = next((s.state for s in running(run) if s.address("grpc")), {}) if run is not None else {}
    host = state.get("address") or served.address.rpartition(":")[0]
    metrics_port, status_port = state.get("metrics_port", 8002), state.get("status_port", 8003)
    return metrics or f"{host}:{metrics_port}", status or (f"{host}:{status_port}" if status_port else "")


def plan_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``vivace rollout start``: ``version`` (0: the newest), ``percent`` of each step by commas, how long
    one lasts (``wait``), per cent of copies (``shadow``), ``least_quality``, whether to ``interleave`` and to
    ``promote``; each as there where it is missing. Raises ValueError that names the field."""
    from vivace.cli.values import duration, percentages

    version = raw.get("version", 0)
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise ValueError(f"version: expected a whole number, got {version!r:.60}")
    plan: dict[str, Any] = {"to": version}
    for name, option, default, read in (("percent", "canary", "5", percentages), ("wait", "wait", "10m", duration)):
        try:
            plan[option] = read(str(raw.get(name) or default))
        except typer.BadParameter as error:
            raise ValueError(f"{name}: {error.message}") from None
    for name, most in (("shadow", 100), ("least_quality", 1)):
        value = raw.get(name)
        if name in raw and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most):
            raise ValueError(f"{name}: expected 0..{most}, got {value!r:.60}")
    for name in ("interleave", "promote"):
        if not isinstance(raw.get(name, False), bool):
            raise ValueError(f"{name}: expected true or false, got {raw[name]!r:.60}")
    return plan | {name: raw[name] for name in ("shadow", "least_quality", "interleave", "promote") if name in raw}


class Operations:
    """Of the server whose metrics and status ports ``ports()`` gives as host:port, the second "" where nobody knows it.
    ``key``: what changes need. For any number of threads."""

    def __init__(
        self,
        run: Run | None,
        artifacts: Path,
        ports: Callable[[], tuple[str, str]],
        access: Mapping[str, Any],
        key: str,
    ) -> None:
        self._run, self._artifacts, self._ports, self._key = run, artifacts, ports, key
        self._credentials = Credentials(**access)

    def _get(self, address: str, path: str, secret: bool = False) -> str:
        pool = HttpPool(address, self._credentials if secret else None)
        try:
            headers = (self._credentials.headers if secret else None) or {}
            answer = pool.post(path, b"", headers, ASK_S, "GET")
        except (OSError, HTTPException) as error:
            raise AwayError(f"{address}{path} does not answer: {error}") from error
        finally:
            pool.close()
        return answer.body.decode()

    def sample(self) -> tuple[float, Samples]:
        """(seconds of a clock, samples). Raises AwayError."""
        metrics, _ = self._ports()
        return time.monotonic(), read_metrics(self._get(metrics, "/metrics", secret=True))

    def health(self) -> dict[str, Any]:
        """``/health`` of the status port; {} where it is not known. Raises AwayError."""
        _, status = self._ports()
        return dict(json.loads(self._get(status, "/health"))) if status else {}

    def versions(self) -> dict[str, Any]:
        """``versions`` that are kept, with their NDCG@10 and the share of users that the running servers send them, and
        the ``rollout`` that goes on, or None."""
        if self._run is None or not self._run.repository.exists():
            return {"versions": [], "rollout": None}
        from serving.control import running_servers
        from serving.releases import card_of, releases, version_of
        from vivace.cli.publish import ndcg_of

        servers = running_servers(self._run)
        rollout = next((s.state["rollout"] for s in servers if s.state.get("rollout")), None)
        share = rollout["share"] if rollout and not rollout["result"] else 0.0
        served = {int(s.state["version"]) for s in servers}
        versions = []
        for release in releases(self._run.repository):
            number = version_of(release)
            traffic = 1 - share if number in served else share if rollout and rollout["version"] == number else 0.0
            versions.append({"version": number, "ndcg": ndcg_of(card_of(release)), "traffic": traffic})
        return {"versions": versions, "rollout": finite(rollout), "servers": len(servers)}  # some are not known yet

    def change(self, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Does what a button says: ``action`` "start" (with what ``plan_of`` reads), "promote" or "stop". Raises
        ForbiddenError for a wrong key, ValueError and ServerError with the reason where it is not done."""
        if not hmac.compare_digest(key.encode(), self._key.encode()):
            raise ForbiddenError("This needs the operator's key, which 'vivace ui' printed when it started.")
        if self._run is None:
            raise ValueError("Rollouts need the run's folder on this machine.")
        from vivace.cli import rollout as verbs
        from vivace.cli.runs import run_name

        named = {"name": run_name(self._run, self._artifacts), "artifacts": self._artifacts}
        action = raw.get("action")
        if action == "start":
            verbs.start(**named, **plan_of(raw))  # type: ignore[arg-type]
        elif action in ("promote", "stop"):
            getattr(verbs, action)(**named)
        else:
            raise ValueError(f"action: expected start, promote or stop, got {action!r:.60}")
        return self.versions()
