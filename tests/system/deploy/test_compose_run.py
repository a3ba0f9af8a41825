"""`docker compose up` for real, from a copy of what git holds, on an engine of its own. Images are built once by
deploy/compose/build.sh and kept; Grafana has no image there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serving.door.keys import add_key
from serving.door.tls import self_signed
from serving.releases import is_free
from serving.start_checks import free_port
from tests.support import PatientClient, wait_until
from tests.system.deploy.engine import CACHE, Engine, NoEngineError, engine
from tests.unit.deploy.test_kubernetes import rendered
from vivace.client import VivaceError
from vivace.manifest import CHECKOUT
from vivace.run import Run

SERVICES = ("triton", "prometheus", "locust")
PORTS = {"HTTP": 8000, "GRPC": 8001, "METRICS": 8002, "STATUS": 8003, "PROMETHEUS": 9090, "LOCUST": 8089, "PAGE": 8010}
OWNER = 1000  # of the artifacts: somebody who is not root


@dataclass(frozen=True)
class Stack:
    """The running project; ``ports`` by the names of its variables."""

    engine: Engine
    checkout: Path
    ports: dict[str, int]

    def compose(self, *arguments: str, **ports: str) -> str:
        """``ports``: in the place of the stack's own, a port or a range."""
        variables = {f"VIVACE_{name}_PORT": str(port) for name, port in (self.ports | ports).items()}
        done = subprocess.run(
            ["docker-compose", "--project-name", "vivace-test", *arguments],
            cwd=self.checkout, env=self.engine.environment | variables, capture_output=True, text=True,
        )  # fmt: skip
        assert not done.returncode, f"docker-compose {' '.join(arguments)}: {done.stderr}\n{self.engine.last_words()}"
        return done.stdout

    def container(self, service: str) -> dict[str, Any]:
        return self.engine.inspect(self.compose("--profile", "page", "ps", "-q", service).strip())

    def healthy(self, service: str) -> bool:
        state = self.container(service)["State"]
        return state["Running"] and state["Health"]["Status"] == "healthy"

    def processes(self, service: str) -> dict[int, tuple[int, str]]:
        """(user, program) of each process of a service, by its pid on this machine."""
        lines = self.engine.docker("top", self.container(service)["Id"], "-eo", "pid,uid,comm").splitlines()[1:]
        return {int(pid): (int(uid), program) for pid, uid, program in (line.split(None, 2) for line in lines)}

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}"

    def ask(self, port: str, path: str, data: dict[str, Any] | None = None) -> Any:
        body = urllib.parse.urlencode(data).encode() if data is not None else None
        with urllib.request.urlopen(self.url(port) + path, body, timeout=10) as answer:
            return json.load(answer)

    def client(self, protocol: str) -> PatientClient:
        return PatientClient(f"127.0.0.1:{self.ports[protocol.upper()]}", protocol)


def _copy(root: Path, target: Path) -> None:
    """What git holds, and the run that was compiled, as a user's."""
    files = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (CHECKOUT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, target / name)
    run, copied = Run(root), Run(target / "artifacts" / "shop")
    for part in (run.compiled, run.feature_store):
        shutil.copytree(part, copied.root / part.name)
    shutil.copytree(run.repository.resolve(), copied.root / run.repository.resolve().name)
    copied.repository.symlink_to(run.repository.resolve().name)
    for path in copied.root.rglob("*"):
        os.chown(path, OWNER, OWNER, follow_symlinks=False)


@pytest.fixture(scope="module")
def stack(root: Path) -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="vivace-compose-") as name:
        folder = Path(name)
        (folder / "engine").mkdir()
        folder.chmod(0o755)
        _copy(root, folder / "vivace")
        try:
            with engine(folder / "engine") as runs:
                built = subprocess.run(
                    [str(folder / "vivace/deploy/compose/build.sh"), str(CACHE)],
                    env=runs.environment, capture_output=True, text=True,
                )  # fmt: skip
                assert not built.returncode, built.stderr
                ports = {port: free_port("127.0.0.1") for port in PORTS}
                running = Stack(runs, folder / "vivace", ports)
                try:
                    running.compose("up", "-d", *SERVICES)
                    for service in SERVICES:
                        wait_until(lambda s=service: running.healthy(s), f"a healthy {service}", 0.5)
                    yield running
                finally:
                    running.compose("down", "--volumes", "--timeout", "30")
        except NoEngineError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_ensemble_answers_through_the_published_ports(stack, protocol):
    with stack.client(protocol) as client:
        user = f"visitor of {protocol}"
        item = client.recommend("", [], 5).items[0]
        assert client.append(user, item, "click") == 1
        answer = client.recommend(user, [], 5)
        assert answer.status == "ok" and len(answer.items) == 5 and item not in answer.items


def test_the_ports_are_the_guards(stack):
    for path in ("/v2/repository/index", "/v2/models/retrieval/infer", "/v2/systemsharedmemory/status"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(stack.url("HTTP") + path, b"{}", timeout=10)
        assert refused.value.code == 404, path


def test_the_server_is_nobody_but_the_runs_owner(stack):
    users = {uid for uid, program in stack.processes("triton").values() if program != "docker-init"}
    assert users == {OWNER}
    assert not is_free(Run(stack.checkout / "artifacts" / "shop").repository.resolve()), "a publish would remove it"
    limits = stack.container("triton")["HostConfig"]
    assert limits["Memory"] == 8 << 30 and limits["NanoCpus"] == 2e9 and limits["ReadonlyRootfs"]


def test_the_image_has_what_search_and_an_index_import(stack):
    modules = "import search.online, serving.runtime.item_index, bm25s, faiss, Stemmer, symspellpy, tokenizers"
    stack.compose("exec", "-T", "triton", "python3", "-c", modules)


def test_prometheus_scrapes_server_and_watchdog(stack):
    def targets() -> dict[str, str]:
        active = stack.ask("PROMETHEUS", "/api/v1/targets")["data"]["activeTargets"]
        return {target["labels"]["job"]: target["health"] for target in active}

    wait_until(lambda: targets() == {"triton": "up", "watchdog": "up"}, "both pages scraped", 0.5)

    def values(query: str) -> list[str]:
        data = stack.ask("PROMETHEUS", f"/api/v1/query?{urllib.parse.urlencode({'query': query})}")["data"]
        return [row["value"][1] for row in data["result"]]

    wait_until(lambda: values("vivace_server_up") == ["1"], "the watchdog's gauge", 0.5)
    wait_until(lambda: values('nv_inference_request_success{model="recommend"}'), "Triton's counts", 0.5)


def test_load_runs(stack):
    stack.ask("LOCUST", "/swarm", {"user_count": 4, "spawn_rate": 4})
    try:
        stats = wait_until(
            lambda: (s := stack.ask("LOCUST", "/stats/requests")) and _requests(s).get("Aggregated", 0) > 200 and s,
            "200 requests", 0.5,
        )  # fmt: skip
        assert {row["method"] for row in stats["stats"]} >= {"grpc", "http"}
        assert not stats["errors"]
    finally:
        stack.ask("LOCUST", "/stop", {})


def _requests(stats: dict[str, Any]) -> dict[str, int]:
    return {row["name"]: row["num_requests"] for row in stats["stats"]}


def test_a_server_that_ends_is_started_again_in_its_container(stack):
    [pid] = [pid for pid, (_, program) in stack.processes("triton").items() if program == "tritonserver"]
    os.kill(pid, signal.SIGKILL)
    with stack.client("grpc") as client:
        assert client.recommend("", [], 5).items
    assert stack.container("triton")["RestartCount"] == 0


def test_containers_that_are_killed_come_back(stack):
    """`docker kill` is no death in Docker's eyes, but an order to stay away: the processes are killed from outside."""
    with stack.client("grpc") as client:
        stored = client.append("kept", client.recommend("", [], 1).items[0], "click")
    for service in SERVICES:
        os.kill(stack.container(service)["State"]["Pid"], signal.SIGKILL)
    for service in SERVICES:
        wait_until(lambda s=service: stack.container(s)["RestartCount"] == 1, f"{service} started again", 0.2)
        wait_until(lambda s=service: stack.healthy(s), f"a healthy {service}", 0.5)
    with stack.client("grpc") as client:
        assert client.append("kept", client.recommend("", [], 1).items[0], "click") == stored + 1


def test_the_page_is_over_the_server_and_reads_no_store(stack):
    stack.compose("--profile", "page", "up", "-d", "page")
    wait_until(lambda: stack.healthy("page"), "a healthy page", 0.5)
    about = stack.ask("PAGE", "/api/about")
    assert about["run"] == "shop" and about["explain"] and not about["local"] and "view" in about["event_types"]
    people = stack.ask("PAGE", "/api/people?q=")
    request = urllib.request.Request(
        f"{stack.url('PAGE')}/api/recommend", json.dumps({"user": people[0]["id"]}).encode(),
        {"Content-Type": "application/json", "Origin": stack.url("PAGE")},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert len(json.load(answer)["items"]) == 12
    assert not stack.compose("--profile", "page", "exec", "-T", "page", "ls", "/artifacts/shop/feature_store")
    stack.compose("--profile", "page", "stop", "--timeout", "1", "page")


def test_a_restart_serves_what_was_published_since(stack):
    repository = Run(stack.checkout / "artifacts" / "shop").repository
    old = repository.resolve()
    new = old.with_name(f"{repository.name}.{int(old.suffix[1:]) + 1}")
    shutil.copytree(old, new)
    repository.unlink()
    repository.symlink_to(new.name)
    assert not is_free(old) and is_free(new)
    stack.compose("restart", "triton")
    with stack.client("http") as client:
        wait_until(lambda: stack.healthy("triton"), "a healthy triton", 0.5)
        assert client.recommend("", [], 5).items
    assert is_free(old) and not is_free(new)


def test_a_stop_is_clean(stack):
    stack.compose("stop")
    state = stack.container("triton")["State"]
    assert (state["ExitCode"], state["Status"]) == (0, "exited")
    assert "stopped" in stack.compose("logs", "--no-color", "--tail", "1", "triton")


# -- several servers on one store, in the place of the one above -----------------------------------------------------
COPIES = 2
POD_USER = 10001  # of deploy/kubernetes


def _range() -> tuple[int, int]:
    """Free ports that follow each other."""
    while True:
        first = free_port("127.0.0.1")
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", first + 1)):
            return first, first + COPIES - 1


@pytest.fixture(scope="module")
def shared(stack: Stack) -> dict[str, tuple[int, int]]:
    """Ports of two servers that share a Valkey, by the names of their variables."""
    stack.compose("stop")
    ranges = {name: _range() for name in ("HTTP", "GRPC", "METRICS", "STATUS")}
    scale = ["--scale", f"triton-shared={COPIES}"]
    ports = {name: f"{first}-{last}" for name, (first, last) in ranges.items()}
    stack.compose("--profile", "shared", "up", "-d", *scale, "triton-shared", "prometheus", **ports)
    for name in stack.compose("--profile", "shared", "ps", "-q", "triton-shared").split():
        wait_until(lambda n=name: stack.engine.inspect(n)["State"]["Health"]["Status"] == "healthy", "health", 0.5)
    return ranges


def test_servers_share_a_store_and_lose_no_event_with_it(stack, shared):
    one, other = (PatientClient(f"127.0.0.1:{port}") for port in shared["GRPC"])
    with one, other:
        item = one.recommend("", [], 1).items[0]
        assert one.append("seen by both", item, "click") == 1
        assert item not in other.recommend("seen by both", [], 5).items
        valkey = stack.engine.inspect(stack.compose("--profile", "shared", "ps", "-q", "valkey").strip())
        assert valkey["HostConfig"]["ReadonlyRootfs"] and not valkey["HostConfig"]["PortBindings"]
        os.kill(valkey["State"]["Pid"], signal.SIGKILL)

        def appended() -> int:
            with contextlib.suppress(VivaceError):
                return other.append("seen by both", item, "click", event_id="after the store")
            return 0

        assert wait_until(appended, "a store that is back") == 2
        wait_until(lambda: one.recommend("seen by both", [], 5).status == "ok", "whole answers")


def test_prometheus_finds_every_server(stack, shared):
    def values(query: str) -> list[str]:
        data = stack.ask("PROMETHEUS", f"/api/v1/query?{urllib.parse.urlencode({'query': query})}")["data"]
        return [row["value"][1] for row in data["result"]]

    def servers() -> list[str]:
        """Instances that are scraped now; older ones are in answers for five minutes, as Prometheus was stopped."""
        active = stack.ask("PROMETHEUS", "/api/v1/targets")["data"]["activeTargets"]
        return [t["labels"]["instance"] for t in active if t["labels"]["job"] == "watchdog" and t["health"] == "up"]

    instances = wait_until(lambda: len(found := servers()) == COPIES and found, "both servers scraped", 0.5)
    ready = f'sum(vivace_ready{{instance=~"{"|".join(instances)}"}})'
    wait_until(lambda: values(ready) == [str(COPIES)], "both servers ready", 0.5)
    p50 = 'histogram_quantile(0.5, sum by (le) (rate(vivace_request_seconds_bucket{model="recommend"}[1m])))'
    wait_until(lambda: values(p50), "a quantile over both", 0.5)
    rules = stack.ask("PROMETHEUS", "/api/v1/rules")["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}


def _limits(pod: dict[str, Any], container: dict[str, Any], folder: Path) -> list[str]:
    """Options of `docker run` that give a container what its pod gives it, and nothing else to write to: folders in the
    place of volumes that containers of a pod share."""
    user = pod["securityContext"]["runAsUser"]
    options = ["--network", "vivace-test_store", "--user", f"{user}:{user}", "--cap-drop", "ALL", "--read-only"]
    options += ["--security-opt", "no-new-privileges", "--memory", container["resources"]["limits"]["memory"][:-1]]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container["volumeMounts"]:
        path, empty = mount["mountPath"], volumes[mount["name"]].get("emptyDir", {})
        if path == "/dev/shm":
            options += ["--shm-size", empty["sizeLimit"].removesuffix("i")]
        elif "emptyDir" not in volumes[mount["name"]] or mount["name"] == "run":
            (folder / mount["name"]).mkdir(exist_ok=True)
            os.chown(folder / mount["name"], user, user)
            options += ["--volume", f"{folder / mount['name']}:{path}" + (":ro" if mount.get("readOnly") else "")]
        else:
            options += ["--tmpfs", f"{path}:exec,mode=1777,size={empty['sizeLimit'].removesuffix('i')}"]
    return options


def test_a_pod_serves_with_what_its_manifest_gives_it(stack, shared, tmp_path):
    """The commands of deploy/kubernetes, one after the other as Kubernetes runs them, in containers as locked."""
    tmp_path.chmod(0o755)
    shutil.copytree(stack.checkout / "artifacts" / "shop", tmp_path / "models" / "shop", symlinks=True)
    for path in (tmp_path / "models").rglob("*"):  # the store's files are their owner's alone
        os.chown(path, POD_USER, POD_USER, follow_symlinks=False)
    values = {"VIVACE_NAME": "shop", "VIVACE_PROFILE": ""}
    values["VIVACE_STORE"] = "valkey://valkey:6379/0?prefix=pod"
    variables = [argument for name, value in values.items() for argument in ("--env", f"{name}={value}")]
    deployment = rendered("overlays/cpu")["deployment/vivace"]["spec"]["template"]["spec"]
    job = rendered("fill")["job/vivace-fill"]["spec"]["template"]["spec"]
    for pod, container in ((job, job["containers"][0]), (deployment, deployment["initContainers"][0])):
        folder = tmp_path if pod is deployment else tmp_path / "fill"
        folder.mkdir(exist_ok=True)
        (folder / "models").exists() or (folder / "models").symlink_to(tmp_path / "models")
        program, *first = container["command"]
        command = [*variables, "--entrypoint", program, container["image"], *first, *container["args"]]
        stack.engine.docker("run", "--rm", *_limits(pod, container, folder), *command)
    assert deployment["securityContext"]["runAsUser"] == job["securityContext"]["runAsUser"] == POD_USER
    with _pod(stack, deployment, tmp_path, variables) as name:
        assert stack.engine.inspect(name)["HostConfig"]["ReadonlyRootfs"]
        assert not stack.engine.docker("exec", name, "python3", "/opt/vivace/deploy/compose/health.py")
    guarded = rendered("overlays/access")["deployment/vivace"]["spec"]["template"]["spec"]
    key = _access(tmp_path / "access")
    ask = "from vivace import VivaceClient as C; c = C('127.0.0.1:8001', ca='/etc/vivace/tls.crt', key={key!r}); "
    ask += "print(len(c.recommend(top_k=3).items))"
    with _pod(stack, guarded, tmp_path, variables) as name:
        assert stack.engine.docker("exec", name, "python3", "-c", ask.format(key=key)) == "3\n"
        with pytest.raises(AssertionError, match="key"):
            stack.engine.docker("exec", name, "python3", "-c", ask.format(key="another"))


def _access(folder: Path) -> str:
    """What the secret vivace-access holds, in ``folder``; the key of a caller."""
    folder.mkdir()
    certificate, private_key, _ = self_signed(folder / "made", "127.0.0.1")
    shutil.copy(certificate, folder / "tls.crt")
    shutil.copy(private_key, folder / "tls.key")
    _, key = add_key(folder / "keys.toml", "caller")
    for path in folder.iterdir():
        os.chown(path, POD_USER, POD_USER)
    return key


@contextlib.contextmanager
def _pod(stack: Stack, pod: dict[str, Any], folder: Path, variables: list[str]) -> Iterator[str]:
    """The container of a pod's server while its probes say that it serves; at the end it stops within its time."""
    server = pod["containers"][0]
    arguments = [argument.replace("$(VIVACE_PROFILE)", "") for argument in server["args"]]
    command = [*_limits(pod, server, folder), *variables, server["image"], *arguments]
    name = stack.engine.docker("run", "--detach", *command).strip()
    try:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = server[probe]["httpGet"]["path"]
            ask = f"import urllib.request as u; u.urlopen('http://127.0.0.1:8003{path}', timeout=3)"
            asked = ["docker", "exec", name, "python3", "-c", ask]
            wait_until(
                lambda a=asked: not subprocess.run(a, env=stack.engine.environment, capture_output=True).returncode,
                f"{path}: 200", 0.5,
            )  # fmt: skip
        yield name
        began, grace_s = time.monotonic(), pod["terminationGracePeriodSeconds"]
        stack.engine.docker("stop", "--time", str(grace_s), name)
        assert time.monotonic() - began + server["lifecycle"]["preStop"]["sleep"]["seconds"] < grace_s
        assert stack.engine.inspect(name)["State"]["ExitCode"] == 0
    except AssertionError:
        print(stack.engine.docker("logs", "--tail", "30", name))
        raise
    finally:
        stack.engine.docker("rm", "--force", name)
