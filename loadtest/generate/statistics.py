"""Per-stage figures from the server itself: Triton's statistics (batches, times) and its latency summaries."""

from __future__ import annotations

import math
import re
import urllib.request
from typing import Any

import tritonclient.grpc as grpcclient

from vivace import contract

MODELS = (*contract.STAGES, contract.QUERY_SEARCH, contract.ENSEMBLE)
_LINE = re.compile(r"^nv_inference_(\w+)_summary_us\{(?P<labels>[^}]*)\} (?P<value>\S+)$")


def statistics(client: grpcclient.InferenceServerClient) -> dict[str, dict[str, float]]:
    """Counters of every model that is loaded, since it was: requests, executions, and nanoseconds by phase."""
    counters = {}
    loaded = {m["name"]: m for m in client.get_inference_statistics(as_json=True)["model_stats"]}
    for model in (m for m in MODELS if m in loaded):
        stats = loaded[model]
        inference = stats.get("inference_stats", {})
        phase = lambda name, inference=inference: float(inference.get(name, {}).get("ns", 0))  # noqa: E731
        counters[model] = {
            "requests": float(stats.get("inference_count", 0)),
            "executions": float(stats.get("execution_count", 0)),
            **{f"{p}_ns": phase(p) for p in ("queue", "compute_input", "compute_infer", "compute_output")},
            "success": float(inference.get("success", {}).get("count", 0)),
            "success_ns": phase("success"),
        }
    return counters


def largest_batches(client: grpcclient.InferenceServerClient) -> dict[str, int]:
    """The largest batch each stage has executed since it was loaded."""
    largest = {}
    for model in contract.STAGES:
        stats = client.get_inference_statistics(model, as_json=True)["model_stats"][-1]
        largest[model] = max((int(b.get("batch_size", 0)) for b in stats.get("batch_stats", [])), default=0)
    return largest


def between(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What happened between two readings, per stage: requests, mean batch, mean milliseconds by phase."""
    out = {}
    for model in after:
        d = {k: after[model][k] - before[model][k] for k in after[model]}
        n = max(d["success"], 1.0)
        out[model] = {
            "requests": d["requests"],
            "batch": d["requests"] / d["executions"] if d["executions"] else 0.0,
            "queue_ms": d["queue_ns"] / n / 1e6,
            "compute_ms": (d["compute_input_ns"] + d["compute_infer_ns"] + d["compute_output_ns"]) / n / 1e6,
            "total_ms": d["success_ns"] / n / 1e6,
        }
    return out


def quantiles(host: str, metrics_port: int) -> dict[str, dict[str, float]]:
    """Latency in ms at p50, p95 and p99 of each model over Triton's sliding window, from its metrics page."""
    with urllib.request.urlopen(f"http://{host}:{metrics_port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    latencies: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if not match or match.group(1) != "request":
            continue
        labels: dict[str, Any] = dict(re.findall(r'(\w+)="([^"]*)"', match.group("labels")))
        value_us = float(match.group("value"))
        if "quantile" in labels and not math.isnan(value_us):  # a model that nobody asked lately has none
            name = f"p{float(labels['quantile']) * 100:.0f}"
            latencies.setdefault(labels["model"], {})[name] = value_us / 1000
    return latencies


def cache_counts(client: grpcclient.InferenceServerClient, model: str = contract.RETRIEVAL) -> tuple[int, int]:
    """(hits, misses) of Triton's response cache for a model since it was loaded."""
    stats = client.get_inference_statistics(model, as_json=True)["model_stats"][-1].get("inference_stats", {})
    return tuple(int(stats.get(f"cache_{kind}", {}).get("count", 0)) for kind in ("hit", "miss"))  # type: ignore[return-value]
