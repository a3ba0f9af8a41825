"""What `docker compose up` starts, as far as a machine without Docker can tell: the file itself, the pages it mounts,
and Prometheus, from its package, scraping the live server and answering the dashboard's own queries. The stack itself
runs in test_compose_run.py."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml

from loadtest.generate.generator import messages, run
from serving.launcher import KEY_HEADER, RESTRICTED
from serving.start_checks import free_port
from serving.status import start_status_page
from tests.support import PATIENCE_S
from vivace.manifest import CHECKOUT
from vivace.store.opening import STORE_URL

COMPOSE = CHECKOUT / "docker-compose.yml"
DASHBOARD = CHECKOUT / "deploy" / "compose" / "grafana" / "dashboards" / "vivace.json"
ELSEWHERE = ("GPU", "Cache of encoded users", "Cache of answers")  # a CPU server without the caches has none of them


@pytest.fixture(scope="module")
def services() -> dict:
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_every_service_is_pinned_watched_limited_and_private(services):
    for name, service in services.items():
        tag = service["image"].rpartition(":")[2]
        assert re.match(r"v?\d", tag), f"{name}: image {service['image']} is not pinned"
        assert service["read_only"] and (name == "fill" or service["healthcheck"]["test"]), name
        limits = service["deploy"]["resources"]["limits"]
        assert "memory" in limits and (name == "triton-gpu" or "cpus" in limits), name
        assert all(str(p).startswith("127.0.0.1:") for p in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            source, _, *mode = volume.split(":") if "${" not in volume else re.split(r":(?!-)", volume)
            if source.startswith("./") and "artifacts" not in source:
                assert (CHECKOUT / source).exists() and mode == ["ro"], f"{name}: {volume}"
        if "build" in service:
            assert (CHECKOUT / service["build"]["dockerfile"]).exists()
    profiles = {name: service["profiles"] for name, service in services.items() if "profiles" in service}
    shared = {name: ["shared"] for name in ("triton-shared", "fill", "valkey")}
    assert profiles == {"triton": ["cpu"], "triton-gpu": ["gpu"], "page": ["page"], **shared}
    assert "COMPOSE_PROFILES=cpu" in (CHECKOUT / ".env").read_text()


def test_only_servers_reach_the_shared_store(services):
    assert {name for name, service in services.items() if "store" in service.get("networks", {})} == {
        "triton-shared", "fill", "valkey",
    }  # fmt: skip
    assert services["valkey"]["networks"] == ["store"] and "ports" not in services["valkey"]
    assert yaml.safe_load(COMPOSE.read_text())["networks"]["store"] == {"internal": True}
    command = services["valkey"]["command"]
    settings = dict(zip(command[1::2], command[2::2], strict=True))
    assert settings["--appendonly"] == "yes" and settings["--maxmemory-policy"] == "noeviction"
    assert settings["--appendfsync"] == "${VIVACE_APPENDFSYNC:-everysec}"
    for name in ("triton-shared", "fill"):
        assert services[name]["environment"][STORE_URL] == "valkey://valkey:6379/0"


def test_nvidias_image_has_what_the_stages_import():
    """And in the versions that the tests run with. The other image installs what pyproject.toml and requirements.txt
    say, and test_compose_run.py starts it."""
    pins = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", (CHECKOUT / "requirements.txt").read_text(), re.M))
    text = (CHECKOUT / "deploy" / "compose" / "gpu.Dockerfile").read_text()
    installed = dict(re.findall(r"([\w-]+)==([\w.]+)", text))
    assert installed == {name: pins[name] for name in installed}
    packages = metadata.packages_distributions()
    needed = {name for module in imported_by_stages() for name in packages.get(module, [module])[:1]}
    assert not {"lmdb", "msgpack", "onnxruntime", "numpy"} - needed, "the stages' imports are not seen"
    assert not needed - set(installed), "not in NVIDIA's image"


def imported_by_stages() -> set[str]:
    """Modules of others that the adapters in the model repository lead to."""
    todo = [path for path in (CHECKOUT / "model_repository").glob("*/1/model.py")]
    todo += (CHECKOUT / "serving" / "triton" / "adapters").glob("*.py")
    seen: set[Path] = set()
    outside: set[str] = set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imports(path):
            file = CHECKOUT / Path(*module.split("."))
            inside = [
                f for f in (file.with_suffix(".py"), file / "__init__.py", file.parent / "__init__.py") if f.exists()
            ]
            if inside:
                todo += inside
            elif (top := module.partition(".")[0]) not in sys.stdlib_module_names and not (CHECKOUT / top).is_dir():
                outside.add(top)
    return outside - {"triton_python_backend_utils", "tritonclient", "grpc"}  # Triton's own; or of a client


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, in functions too, but not for a type checker alone."""
    tree = ast.parse(path.read_text())
    for node in [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]:
        node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_management_calls_of_nvidias_server_need_the_key():
    script = (CHECKOUT / "deploy" / "compose" / "gpu.sh").read_text()
    assert f"restricted={RESTRICTED}\n" in script
    for flag in ("--http-restricted-api", "--grpc-restricted-protocol"):
        assert f'{flag}="$restricted:{KEY_HEADER}=$key"' in script


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose (apt-get install docker-compose)")
@pytest.mark.parametrize("profile", ["cpu", "gpu", "shared", "page"], ids="profile-{}".format)  # gpu alone is a mark
def test_compose_takes_the_file(profile):
    command = ["docker-compose", "-f", str(COMPOSE), "--profile", profile, "config"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert {"prometheus", "grafana", "locust"} <= set(yaml.safe_load(done.stdout)["services"])


def test_the_health_check_asks_a_question(served, tmp_path):
    server, _ = served
    script = CHECKOUT / "deploy" / "compose" / "health.py"
    for port, code in ((server.http_port, 0), (free_port(server.host), 1)):
        env = {"VIVACE_URL": f"http://{server.host}:{port}", "VIVACE_RESTART_S": "0"}
        assert subprocess.run([sys.executable, str(script)], env=env, capture_output=True).returncode == code


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus (apt-get install prometheus)")
def test_prometheus_answers_the_dashboards_queries(fleet, root, tmp_path):
    server = fleet.replicas[0].server
    text = (CHECKOUT / "deploy" / "compose" / "prometheus.yml").read_text()
    status_port = free_port(server.host)
    start_status_page(server.host, status_port, fleet)
    for job in (config := yaml.safe_load(text))["scrape_configs"]:  # no name service here says where triton is
        (found,) = job.pop("dns_sd_configs")
        here = {8002: server.metrics_port, 8003: status_port}[found["port"]]
        job["static_configs"] = [{"targets": [f"{server.host}:{here}"]}]
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    rules = (COMPOSE.parent / "deploy" / "compose" / "rules.yml").read_text()
    (tmp_path / "rules.yml").write_text(re.sub(r"interval: \d+s", "interval: 1s", rules))
    port = free_port("127.0.0.1")
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
         f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        pool = messages(root)
        deadline = time.monotonic() + PATIENCE_S
        while silent := _silent(port):  # calls all the while: a rate has two looks at a counter that grows between them
            assert time.monotonic() < deadline, f"no query of these panels has an answer: {silent}"
            run(f"{server.host}:{server.grpc_port}", pool[:100], np.arange(100) / 100, 1.0, 50.0, PATIENCE_S)
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
