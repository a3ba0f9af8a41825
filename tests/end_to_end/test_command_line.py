"""The whole path by the command line on small data: prepare, train, evaluate, compile, serve, query, load."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from loadtest.generate.run_locust import results, run_locust
from preprocessing.requests import recorded
from serving.segments import SHM
from tests.support import PATIENCE_S, on_free_ports, quiet, vivace, wait_until
from vivace import contract
from vivace.manifest import CHECKOUT


def abandoned(segments: set[Path]) -> set[Path]:
    """Those that no process maps: other servers of this machine may come and go."""
    mapped = ""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mapped += (process / "maps").read_text()
    return {s for s in segments if s.exists() and str(s) not in mapped}


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
    from serving.service import service

    root = artifacts / "shop"
    options = on_free_ports(root / "model_repository")
    with service(options, quiet) as (server, _):
        user = recorded(root)[contract.USER][0]
        for protocol, port in (("grpc", server.grpc_port), ("http", server.http_port)):
            out = vivace(
                "query", "--name", "shop", "--artifacts", str(artifacts), "--user", user,
                "--url", f"{server.host}:{port}", "--protocol", protocol,
            )  # fmt: skip
            assert out.returncode == 0 and "STATUS ok" in out.stdout, out.stdout + out.stderr
        refused = vivace("query", "--name", "shop", "--top-k", "0", "--url", f"{server.host}:{server.grpc_port}")
        assert refused.returncode == 2 and "--top-k" in refused.stderr
        code = run_locust(root, server.host, server.http_port, server.grpc_port, "both", 2, 5, quiet=True)
        rows = {r["protocol"]: r for r in results(root)}
        assert code == int(any(r["failures"] for r in rows.values())) and set(rows) == {"grpc", "http"}
        assert all(r["requests"] > r["failures"] for r in rows.values()), rows  # a queue refuses after a second


def test_ctrl_c_in_the_middle_leaves_nothing_and_resumes(artifacts):
    """The demo is interrupted while it trains: no process, no lock, no segment; the next run goes on."""
    before = set(SHM.glob("vivace_*"))
    options = ["--artifacts", str(artifacts / "demo"), "--preset", "tiny"]
    command = [sys.executable, "-m", "vivace.cli.main", "demo", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=CHECKOUT, start_new_session=True
    )
    root = artifacts / "demo" / "shop"
    begun = root / "retrieval" / "checkpoint.key"
    wait_until(lambda: begun.exists() or process.poll() is not None, "training has begun")
    assert process.poll() is None, process.communicate()[0].decode()
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=PATIENCE_S)[0].decode()
    assert process.returncode == 130, output
    assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]
    assert not abandoned(set(SHM.glob("vivace_*")) - before)
    out = vivace("prepare", "--artifacts", str(artifacts / "demo"))
    assert out.returncode == 0 and "nothing to do" in out.stdout, out.stdout


def test_doctor_lists_what_this_machine_offers(artifacts):
    out = vivace("doctor", "--artifacts", str(artifacts))
    assert out.returncode == 0, out.stdout
    assert "tritonserver" in out.stdout and "ready to serve" in out.stdout


def test_a_typing_error_in_a_choice_is_named(artifacts):
    out = vivace("prepare", "--data", "movielens", "--artifacts", str(artifacts))
    assert out.returncode == 2 and "expected one of" in out.stderr
    out = vivace("prepare", "--data", "ml-1m", "--artifacts", str(artifacts))
    assert out.returncode == 1 and "--path" in out.stderr
    card = json.loads((artifacts / "shop" / "compiled" / "model_card.json").read_text())
    assert card["data"] == "shop"
