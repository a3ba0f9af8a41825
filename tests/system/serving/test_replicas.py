"""Several servers behind one door: calls are spread, and what ends, hangs or is exchanged leaves the others."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.acceptance import Acceptance
from serving.door.options import DoorOptions
from serving.fleet import Fleet
from serving.releases import put_in_use
from serving.wheel import ServerError
from tests.support import PatientClient, Second, on_free_ports, own_copy, quiet, wait_until
from tests.system.serving.test_publish import Callers, answer, newest, ports_of
from tests.system.serving.test_versions import HISTORY, publish_with_other_items
from vivace import contract
from vivace.run import Run


@pytest.fixture(scope="module")
def fleet(root, tmp_path_factory):
    """Two servers of a copy of the small shop."""
    run = Run(own_copy(root, tmp_path_factory.mktemp("replicas")))
    with Fleet(on_free_ports(run.repository, guard=True, profile="fused"), quiet, count=2) as fleet:
        wait_until(lambda: fleet.ready and all(r.watchdog.health.ready for r in fleet.replicas), "two ready servers")
        yield fleet


def executed(fleet: Fleet) -> list[float]:
    """Calls of ``recommend`` that each server has answered, as the public metrics port says."""
    server = fleet.replicas[0].server
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as page:
        families = text_string_to_metric_families(page.read().decode())
    counts = {
        s.labels.get("replica", "0"): s.value
        for f in families
        for s in f.samples
        if s.name == "nv_inference_request_success_total" and s.labels["model"] == contract.ENSEMBLE
    }
    return [counts[str(place)] for place in range(len(counts))]


def test_the_calls_of_one_channel_are_spread(fleet):
    before = executed(fleet)
    with PatientClient(f"127.0.0.1:{ports_of(fleet)['grpc']}") as client, ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda _: client.recommend(history=HISTORY, top_k=5), range(1600)))

    def counts() -> list[float]:
        return [after - b for after, b in zip(executed(fleet), before, strict=True)]

    wait_until(lambda: sum(counts()) >= 1600, "1,600 calls on the page")  # a moment after the answer
    assert min(counts()) >= 0.1 * sum(counts()), counts()  # where one is slower, the other is given more


def test_a_server_that_is_killed_costs_nobody_an_answer(fleet):
    expected = answer(fleet)
    with Callers(ports_of(fleet)) as callers:
        for replica in fleet.replicas:
            dead, count = replica.server.pid, len(callers.answers)
            os.kill(dead, signal.SIGKILL)
            wait_until(lambda n=count: len(callers.answers) > n + 20 or callers.errors, "answers of the other")
            wait_until(lambda r=replica, d=dead: r.server.pid != d and r.watchdog.health.ready, "the server again")
    assert callers.errors == [] and {tuple(items) for _, items in callers.answers} == {tuple(expected[0][:5])}
    with PatientClient(f"127.0.0.1:{ports_of(fleet)['grpc']}") as client:
        lengths = [client.append(user, HISTORY[1], "view") for user, _ in callers.appended]
    assert lengths == [2] * len(lengths), "every acknowledged event is there, once"


def test_a_server_that_hangs_is_left_out_within_two_seconds(fleet):
    server = fleet.replicas[1].server
    with PatientClient(f"127.0.0.1:{ports_of(fleet)['grpc']}") as client:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            left_out = Second(fleet.door, 2.0)
            clusters = partial(fleet.door.ask, "GET", "/clusters")
            left_out.shows(clusters, lambda page: "/failed_active_hc" in page, "a server that is left out")

            def took_s(_: int) -> float:
                began = time.monotonic()
                client.recommend(history=HISTORY, top_k=5)
                return time.monotonic() - began

            with ThreadPoolExecutor(8) as pool:
                wait_until(
                    lambda: max(pool.map(took_s, range(80))) < DoorOptions.try_s, "80 calls that wait for nobody"
                )
        finally:
            os.kill(server.pid, signal.SIGCONT)
    wait_until(lambda: all(r.watchdog.health.ready for r in fleet.replicas), "two ready servers")


def test_servers_come_and_go_and_no_call_is_lost(fleet):
    run, first = Run(fleet.release.parent), fleet.release
    publish_with_other_items(run)  # it is not served, and what comes is of the version that is
    with Callers(ports_of(fleet)) as callers:
        for count in (1, 2):
            fleet.scale(count, quiet)
            assert {r.server.release for r in fleet.replicas} == {first}
            assert len(fleet.replicas) == count and all(r.server.ready() for r in fleet.replicas)
    put_in_use(first, run.repository)
    assert callers.errors == [], callers.errors
    wait_until(lambda: len(executed(fleet)) == 2, "metrics of both")


def test_a_version_that_one_of_them_refuses_is_served_by_none(fleet):
    run, first, seen = Run(fleet.release.parent), fleet.release, []
    publish_with_other_items(run)

    def accept(old, new) -> str:
        seen.append(new)
        if len(seen) == 2:
            raise ServerError("no good")
        return "good"

    with pytest.raises(ServerError, match="no good"):
        fleet.serve(newest(run), accept, quiet)
    put_in_use(first, run.repository)
    assert len(seen) == 2 and {r.server.release for r in fleet.replicas} == {first} and len(fleet.replicas) == 2
    wait_until(lambda: all(r.watchdog.health.ready for r in fleet.replicas), "two ready servers")


def test_a_version_comes_to_all_of_them_one_by_one(fleet):
    run = Run(fleet.release.parent)
    first, before = fleet.release, answer(fleet)
    publish_with_other_items(run)
    with Callers(ports_of(fleet)) as callers:
        for release in (newest(run), first):
            fleet.serve(release, Acceptance([]), quiet)
            assert {r.server.release for r in fleet.replicas} == {release} and len(fleet.replicas) == 2
    assert callers.errors == [] and len({tuple(items) for _, items in callers.answers}) == 2
    assert answer(fleet) == before
