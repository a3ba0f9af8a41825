"""A newer version takes the place of the served one: no call is lost, and one that is no good never gets there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

from serving.acceptance import Acceptance, recorded_calls
from serving.control import running_servers
from serving.fleet import Fleet
from serving.releases import publishing, put_in_use, releases, seal
from serving.wheel import ServerError
from tests.support import NOON, PATIENCE_S, PatientClient, on_free_ports, own_copy, quiet, vivace, wait_until
from tests.system.serving.test_lifecycle import serving
from tests.system.serving.test_versions import HISTORY, publish_with_other_items, run
from vivace import contract
from vivace.manifest import CHECKOUT
from vivace.run import Run

__all__ = ["run"]  # the fixture


class Callers:
    """Calls of ``recommend`` and ``append`` over both protocols, one after the other, while the block runs."""

    def __init__(self, fleet_ports: dict[str, int]) -> None:
        self.answers: list[tuple[float, list[str]]] = []
        self.appended: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self._ports, self._stop = fleet_ports, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(p, n)) for n, p in enumerate(("grpc", "http") * 2)]

    def _run(self, protocol: str, number: int) -> None:
        count = 0
        with PatientClient(f"127.0.0.1:{self._ports[protocol]}", protocol) as client:
            while not self._stop.is_set():
                count += 1
                try:
                    items = client.recommend(history=HISTORY, top_k=5, context=NOON).items
                    self.answers.append((time.monotonic(), items))
                    event = f"caller-{number}-{count}"
                    client.append(event, HISTORY[0], "view")
                    self.appended.append((event, HISTORY[0]))
                except Exception as error:
                    self.errors.append(str(error))

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: len(self.answers) > 10 or self.errors, "answers")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def ports_of(fleet: Fleet) -> dict[str, int]:
    server = fleet.replicas[0].server
    return {"grpc": server.grpc_port, "http": server.http_port}


def answer(fleet: Fleet) -> tuple[list[str], bytes]:
    with PatientClient(f"127.0.0.1:{ports_of(fleet)['grpc']}") as client:
        given = client.recommend(history=HISTORY, top_k=20, context=NOON)
    return given.items, given.scores.tobytes()


def tritonservers() -> set[int]:
    """Those below this process, which other tests start too."""
    below = psutil.Process().children(recursive=True)
    return {p.pid for p in below if p.name() == "tritonserver" and p.status() != psutil.STATUS_ZOMBIE}


def newest(run: Run) -> Path:
    return releases(run.repository)[-1]


def test_versions_come_and_go_under_load_and_no_call_is_lost(run):
    first, others = run.repository.resolve(), tritonservers()
    with Fleet(on_free_ports(run.repository, guard=True), quiet) as fleet:
        before = answer(fleet)
        publish_with_other_items(run)
        second = newest(run)
        with Callers(ports_of(fleet)) as callers:
            for release in (second, first):
                fleet.serve(release, Acceptance([]), quiet)
                assert fleet.release == release
                seen = len(callers.answers)
                wait_until(lambda n=seen: len(callers.answers) > n + 10 or callers.errors, "answers of the new version")
        assert callers.errors == []
        assert {tuple(items) for _, items in callers.answers} == {
            tuple(before[0][:5]),
            tuple(items_of(second, fleet)),
        }
        assert answer(fleet) == before, "the earlier version answers bit for bit as it did"
        with PatientClient(f"127.0.0.1:{ports_of(fleet)['grpc']}") as client:
            lengths = [client.append(user, HISTORY[1], "view") for user, _ in callers.appended[::10]]
        assert lengths == [2] * len(lengths), "every acknowledged event is there"
        replica = fleet.replicas[0]
        assert tritonservers() - others == {replica.server.pid}, "the servers of other versions have ended"
        os.kill(replica.server.pid, signal.SIGKILL)  # its watchdog brings it back as the version it was
        assert answer(fleet) == before


def items_of(release: Path, fleet: Fleet, count: int = 5) -> list[str]:
    """The first of ``release``, whose ids mean other items than those of the served version."""
    old, new = (json.loads(next(r.glob("response/*/items.json")).read_text()) for r in (fleet.release, release))
    return [new[old.index(item)] for item in answer(fleet)[0][:count]]


@contextlib.contextmanager
def other_values(release: Path) -> Iterator[tuple[onnx.GraphProto, str, str]]:
    """The ranker's graph of a version, for the block to put nodes between the values that it works out and those that
    it answers: (graph, name of the first, name of the second)."""
    path = next(release.glob(f"{contract.RANKING}/*/model.onnx"))
    model = onnx.load(path)
    output = model.graph.output[1].name
    for node in model.graph.node:
        node.output[:] = [f"{name}_sound" if name == output else name for name in node.output]
    yield model.graph, f"{output}_sound", output
    onnx.save(model, path)
    seal(release)


def poisoned(run: Run) -> Path:
    """A version whose ranker answers NaN."""
    publish_with_other_items(run)
    with other_values(newest(run)) as (graph, sound, output):
        graph.initializer.append(onnx.helper.make_tensor("poison", onnx.TensorProto.FLOAT, [], [np.nan]))
        graph.node.append(onnx.helper.make_node("Mul", [sound, "poison"], [output]))
    return newest(run)


def test_a_version_that_is_no_good_is_refused_and_the_old_one_goes_on(root, tmp_path):
    run = Run(own_copy(root, tmp_path))
    with Fleet(on_free_ports(run.repository, guard=True), quiet) as fleet:
        before, pid = answer(fleet), fleet.replicas[0].server.pid
        release = poisoned(run)
        with Callers(ports_of(fleet)) as callers:
            with pytest.raises(ServerError, match=r"not ready|no numbers|no items"):
                fleet.serve(release, Acceptance(recorded_calls(run)), quiet)
            put_in_use(fleet.release, run.repository)
            publish_with_other_items(run)
            with pytest.raises(ServerError, match=r"clearly worse: NDCG@10 .* --least-quality 0"):
                fleet.serve(newest(run), Acceptance(recorded_calls(run)), quiet)
            broken = releases(run.repository)[-1]
            next(broken.glob("retrieval/*/model.onnx")).write_bytes(b"no graph")
            with pytest.raises(ValueError, match="not as it was published"):
                fleet.serve(broken, Acceptance([]), quiet)
        assert callers.errors == [] and {tuple(items) for _, items in callers.answers} == {tuple(before[0][:5])}
        assert answer(fleet) == before and fleet.replicas[0].server.pid == pid
        value = fleet.registry.get_sample_value
        assert value("vivace_version_changes_total", {"result": "refused"}) == 3
        assert value("vivace_version_changes_total", {"result": "done"}) == 0


def test_the_command_line_publishes_goes_back_and_says_who_serves_what(run, tmp_path):
    where = ("--name", run.root.name, "--artifacts", str(run.root.parent))
    first = run.repository.resolve()
    with serving(run.root, tmp_path) as process:
        publish_with_other_items(run)
        second = newest(run)
        done = vivace("rollout", "start", "--canary", "5,50", *where)
        assert done.returncode == 0 and "answers 5 % of the users" in done.stdout, done.stdout + done.stderr
        assert run.repository.resolve() == first, "a server that starts meanwhile serves what everyone has"
        shown = vivace("versions", *where).stdout
        assert (
            "5 % of the users" in " ".join(shown.split())
            and "step 1 of 2" in vivace("rollout", "status", *where).stdout
        )
        busy = vivace("publish", "--to", first.name[-1], *where)
        assert busy.returncode == 0, busy.stderr  # it is served already
        busy = vivace("publish", *where)
        assert busy.returncode == 1 and "is on trial" in busy.stderr, busy.stdout
        done = vivace("rollout", "promote", *where)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{second.name}: takes what comes" in done.stdout and run.repository.resolve() == second
        over = vivace("rollout", "stop", *where)
        assert over.returncode == 1 and "no version is on trial" in over.stderr
        (server,) = running_servers(run)
        assert server.pid == process.pid and server.state["release"] == str(second)
        shown = vivace("versions", *where).stdout
        assert f"process {process.pid}" in next(line for line in shown.splitlines() if f" {second.name[-1]} " in line)
        next(second.glob("retrieval/*/model.onnx")).write_bytes(b"no graph")  # what is served may break on disk
        done = vivace("rollback", *where)
        assert done.returncode == 0, done.stdout + done.stderr
        assert run.repository.resolve() == first and running_servers(run)[0].state["release"] == str(first)
        refused = vivace("publish", *where)
        assert refused.returncode == 1 and "not as it was published" in refused.stderr
        assert run.repository.resolve() == first and running_servers(run)[0].state["release"] == str(first)
        nothing = vivace("rollback", *where)
        assert nothing.returncode == 1 and "nothing to go back to" in nothing.stderr
    assert running_servers(run) == [] and not list(run.servers.iterdir())
    done = vivace("publish", "--to", first.name.rpartition(".")[2], *where)
    assert done.returncode == 0 and "no running server of this run is known here" in done.stdout


def test_a_server_that_is_stopped_in_the_middle_has_accepted_nothing(run, tmp_path):
    first = run.repository.resolve()
    publish_with_other_items(run)
    second = newest(run)
    put_in_use(first, run.repository)
    command = [sys.executable, "-m", "vivace.cli.main", "publish", "--name", run.root.name]
    with serving(run.root, tmp_path) as process:
        publish = subprocess.Popen(
            [*command, "--artifacts", str(run.root.parent)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=CHECKOUT,
        )  # fmt: skip
        assert publish.stdout is not None
        lines = [publish.stdout.readline()]
        assert f"starting {second.name}" in lines[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        said = "".join([*lines, *publish.communicate(timeout=PATIENCE_S)[0:1]])
    assert publish.returncode == 1 and "the server ended before that was done" in " ".join(said.split()), said
    assert run.repository.resolve() == first


def test_a_half_written_version_is_never_there(run):
    with pytest.raises(RuntimeError), publishing(run.repository) as (folder, _):
        (folder / "half").write_text("")
        raise RuntimeError
    assert len(releases(run.repository)) == 1
