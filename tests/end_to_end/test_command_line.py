"""The whole path by the command line on small data: prepare, train, evaluate, compile, serve, query, load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from loadtest.generate.run_locust import results, run_locust
from preprocessing.requests import recorded
from serving.launcher import SHM
from vivace import contract

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def vivace(*arguments: str, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vivace.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, **more)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


def test_the_path_step_by_step(artifacts):
    where = ["--artifacts", str(artifacts)]
    out = vivace("train", "--name", "shop", *where)
    assert out.returncode == 1 and "vivace prepare" in out.stderr
    steps = [
        ["prepare", "--data", "shop", "--users", "300", "--items", "200", "--events", "5000", "--partitions", "2"],
        ["train", "--name", "shop", "--preset", "tiny"],
        ["evaluate", "--name", "shop", "--preset", "tiny"],
        ["compile", "--name", "shop", "--preset", "tiny"],
    ]
    for step in steps:
        out = vivace(*step, *where)
        assert out.returncode == 0, out.stdout + out.stderr
    assert "NDCG@10" in vivace("evaluate", "--name", "shop", "--preset", "tiny", *where).stdout
    again = vivace(*steps[1], *where)
    assert "nothing to do" in again.stdout


def test_query_and_load_against_the_served_models(artifacts):
    from serving.launcher import ServerOptions
    from serving.service import service

    root = artifacts / "shop"
    options = ServerOptions(
        root / "model_repository", http_port=0, grpc_port=0, metrics_port=0, log=root / "triton.log"
    )
    with service(options, lambda _: None) as (server, _):
        user = recorded(root)[contract.USER][0]
        for protocol, port in (("grpc", server.grpc_port), ("http", server.http_port)):
            out = vivace(
                "query", "--name", "shop", "--artifacts", str(artifacts), "--user", user,
                "--url", f"{server.host}:{port}", "--protocol", protocol,
            )  # fmt: skip
            assert out.returncode == 0 and "STATUS ok" in out.stdout, out.stdout + out.stderr
        refused = vivace("query", "--name", "shop", "--top-k", "0", "--url", f"{server.host}:{server.grpc_port}")
        assert refused.returncode == 2 and "--top-k" in refused.stderr
        code = run_locust(root, server.host, server.http_port, server.grpc_port, "both", 4, 5, quiet=True)
        rows = {r["protocol"]: r for r in results(root)}
        assert code == 0 and set(rows) == {"grpc", "http"}
        assert all(r["requests"] > 20 and r["failures"] == 0 for r in rows.values()), rows


def test_ctrl_c_in_the_middle_leaves_nothing_and_resumes(artifacts):
    """The demo is interrupted while it trains: no process, no lock, no segment; the next run goes on."""
    before = set(SHM.glob("vivace_*"))
    command = [sys.executable, "-m", "vivace.cli", "demo", "--artifacts", str(artifacts / "demo"), "--preset", "tiny"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=CHECKOUT, start_new_session=True
    )
    root = artifacts / "demo" / "shop"
    deadline = time.monotonic() + 180
    while not (root / "retrieval" / "checkpoint.key").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.0)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, output
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert set(SHM.glob("vivace_*")) == before
    out = vivace("prepare", "--artifacts", str(artifacts / "demo"))
    assert out.returncode == 0 and "nothing to do" in out.stdout, out.stdout


def test_doctor(artifacts):
    out = vivace("doctor", "--artifacts", str(artifacts))
    assert out.returncode == 0, out.stdout
    assert "tritonserver" in out.stdout and "ready to serve" in out.stdout


def test_readme_commands_exist():
    """Each `vivace` and `make` command of the README is one that exists, and the two promised ones are there."""
    text = (CHECKOUT / "README.md").read_text()
    assert "make demo" in text and "make test" in text
    import re

    verbs = set(re.findall(r"^(?:\.venv/bin/)?vivace (\w+)", text, re.M))
    known = vivace("--help").stdout
    assert verbs and all(verb in known for verb in verbs)
    targets = set(re.findall(r"^make (\w+)", text, re.M))
    makefile = (CHECKOUT / "Makefile").read_text()
    assert all(f"\n{t}:" in makefile for t in targets)


def test_a_typing_error_in_a_choice_is_named(artifacts):
    out = vivace("prepare", "--data", "movielens", "--artifacts", str(artifacts))
    assert out.returncode == 2 and "expected one of" in out.stderr
    out = vivace("prepare", "--data", "ml-1m", "--artifacts", str(artifacts))
    assert out.returncode == 1 and "--path" in out.stderr
    card = json.loads((artifacts / "shop" / "compiled" / "model_card.json").read_text())
    assert card["data"] == "shop"
