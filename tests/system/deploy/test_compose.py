"""What `docker compose up` starts, as far as a machine without Docker can tell: the file itself, the pages it mounts,
and Prometheus, from its package, scraping the live server and answering the dashboard's own queries. The stack itself
runs in test_compose_run.py."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request

import numpy as np
import pytest
import yaml

from loadtest.generate.generator import messages, run
from serving.start_checks import free_port
from tests.support import PATIENCE_S, PatientClient, wait_until
from vivace.manifest import CHECKOUT

COMPOSE = CHECKOUT / "docker-compose.yml"
DASHBOARD = CHECKOUT / "deploy" / "compose" / "grafana" / "dashboards" / "vivace.json"
ELSEWHERE = ("GPU", "Cache of encoded users")  # panels that a CPU server without that cache has nothing for


@pytest.fixture(scope="module")
def services() -> dict:
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_every_service_is_pinned_watched_limited_and_private(services):
    for name, service in services.items():
        tag = service["image"].rpartition(":")[2]
        assert re.match(r"v?\d", tag), f"{name}: image {service['image']} is not pinned"
        assert service["healthcheck"]["test"] and service["read_only"], name
        limits = service["deploy"]["resources"]["limits"]
        assert "memory" in limits and (name == "triton-gpu" or "cpus" in limits), name
        assert all(str(p).startswith("127.0.0.1:") for p in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            source, _, *mode = volume.split(":") if "${" not in volume else re.split(r":(?!-)", volume)
            if source.startswith("./") and "artifacts" not in source:
                assert (CHECKOUT / source).exists() and mode == ["ro"], f"{name}: {volume}"
        if "build" in service:
            assert (CHECKOUT / service["build"]["dockerfile"]).exists()
    assert services["triton"]["profiles"] == ["cpu"] and services["triton-gpu"]["profiles"] == ["gpu"]
    assert "COMPOSE_PROFILES=cpu" in (CHECKOUT / ".env").read_text()


def test_the_images_have_what_the_environment_has():
    """The versions in the Dockerfiles are those that the tests run with."""
    pins = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", (CHECKOUT / "requirements.txt").read_text(), re.M))
    found = 0
    for file in (CHECKOUT / "deploy" / "compose").glob("*.Dockerfile"):
        for name, version in re.findall(r"([\w-]+)(?:\[[\w,]+\])?==([\w.]+)", file.read_text()):
            assert pins[name] == version, f"{file.name}: {name} {version}, requirements.txt has {pins[name]}"
            found += 1
    assert found >= 6


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose (apt-get install docker-compose)")
def test_compose_takes_the_file():
    done = subprocess.run(
        ["docker-compose", "-f", str(COMPOSE), "--profile", "cpu", "config"], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    assert {"triton", "redis", "prometheus", "grafana", "locust"} <= set(yaml.safe_load(done.stdout)["services"])


def test_the_health_check_asks_a_question(served, tmp_path):
    server, _ = served
    script = CHECKOUT / "deploy" / "compose" / "health.py"
    for port, code in ((server.http_port, 0), (free_port(server.host), 1)):
        env = {"VIVACE_URL": f"http://{server.host}:{port}", "VIVACE_RESTART_S": "0"}
        assert subprocess.run([sys.executable, str(script)], env=env, capture_output=True).returncode == code


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus (apt-get install prometheus)")
def test_prometheus_answers_the_dashboards_queries(served, root, tmp_path):
    server, _ = served
    text = (CHECKOUT / "deploy" / "compose" / "prometheus.yml").read_text()
    text = text.replace("triton:8002", f"{server.host}:{server.metrics_port}").replace("5s", "1s").replace("4s", "1s")
    (tmp_path / "prometheus.yml").write_text(text)
    port = free_port("127.0.0.1")
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
         f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        pool = messages(root)
        for _ in range(4):
            run(f"{server.host}:{server.grpc_port}", pool[:100], np.arange(100) / 100, 1.0, 50.0, PATIENCE_S)
        with PatientClient(f"{server.host}:{server.grpc_port}") as client:
            client.recommend("", [], 3)
        wait_until(lambda: _silent(port) == [], "an answer to each panel's query", 0.5)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        log.close()


def _silent(port: int) -> list[str]:
    """Panels of which no query has an answer, or one is refused."""
    out = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        found = 0
        for target in panel["targets"]:
            url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": target["expr"]})
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    found += len(json.load(answer)["data"]["result"])
            except OSError:
                return [panel["title"]]
        if not found and panel["title"] not in ELSEWHERE:
            out.append(panel["title"])
    return out
