"""Runs the locust file as ``vivace load`` and the demo do."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

from preprocessing.requests import recorded
from vivace.manifest import CHECKOUT

FILE = Path(__file__).with_name("locustfile.py")
OPEN = Path(__file__).with_name("locust_open.py")
USERS = {"grpc": ["GrpcUser"], "http": ["HttpUser"], "both": ["GrpcUser", "HttpUser"]}
STATS = "locust_stats.csv"
GRACE_S = 60.0  # for the start and the end of a headless run
SHAPES = ("constant", "ramp", "burst", "diurnal")


def level(shape: str, seconds: float, length: float) -> float:
    """The rate at a moment as a multiple of the mean (ramp: of the last step's)."""
    if shape == "ramp":
        return min(5, 1 + math.floor(5 * seconds / length)) / 5
    if shape == "burst":
        return 2.5 if seconds % 10 < 2 else 0.625
    if shape == "diurnal":
        return 1 - 0.8 * math.cos(2 * math.pi * seconds / length)
    return 1.0


def command(
    root: Path, host: str, http_port: int, grpc_port: int, protocol: str, users: int, seconds: int, web: bool,
    shape: str = "", qps: float = 100.0,
) -> list[str]:  # fmt: skip
    if protocol not in USERS:
        raise ValueError(f"--protocol: expected one of {sorted(USERS)}, got {protocol!r}")
    if shape and shape not in SHAPES:
        raise ValueError(f"--shape: expected one of {SHAPES}, got {shape!r}")
    base = [
        sys.executable, "-m", "locust", "-f", str(OPEN if shape else FILE), "--artifacts", str(root),
        "--grpc-url", f"{host}:{grpc_port}", "--http-url", f"{host}:{http_port}",
    ]  # fmt: skip
    if shape:
        base += ["--shape", shape, "--qps", str(qps), "--shape-seconds", str(seconds)]
    else:
        base += ["-u", str(users), "-r", str(users), "-t", f"{seconds}s"]
    if web:
        base += ["--web-host", "127.0.0.1", "--autostart"]
    else:
        base += ["--headless", "--stop-timeout", "5", "--csv", str(root / "locust")]
    return [*base, *(name.replace("User", "OpenUser" if shape else "User") for name in USERS[protocol])]


def run_locust(
    root: Path, host: str, http_port: int, grpc_port: int, protocol: str, users: int, seconds: int, web: bool = False,
    quiet: bool = False, shape: str = "", qps: float = 100.0,
) -> int:  # fmt: skip
    """Runs locust to its end; returns its exit code (1: some requests failed)."""
    recorded(root)
    line = command(root, host, http_port, grpc_port, protocol, users, seconds, web, shape, qps)
    if quiet:
        line += ["--only-summary", "--loglevel", "WARNING"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))}
    (root / STATS).unlink(missing_ok=True)
    limit = None if web else seconds + GRACE_S
    try:
        if not quiet:
            return subprocess.run(line, env=env, timeout=limit).returncode
        with (root / "locust.log").open("w") as log:
            return subprocess.run(line, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=limit).returncode
    except subprocess.TimeoutExpired:  # seen once: its figures were written and gRPC's threads did not end
        return int(not (root / STATS).exists() or any(r["failures"] for r in results(root)))


def results(root: Path) -> list[dict[str, float | str]]:
    """Rows of the last headless run: protocol, requests, failures, QPS, p50, p95 and p99 in ms."""
    with (root / STATS).open() as stream:
        rows = [r for r in csv.DictReader(stream) if r["Type"]]
    return [
        {
            "protocol": r["Type"],
            "requests": int(r["Request Count"]),
            "failures": int(r["Failure Count"]),
            "qps": float(r["Requests/s"]),
            **{f"p{q}": float(r[f"{q}%"]) for q in (50, 95, 99)},
        }
        for r in rows
    ]
