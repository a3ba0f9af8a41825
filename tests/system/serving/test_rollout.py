"""A version on trial: who gets it, that nobody notices its death, and that one which does worse goes by itself."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from prometheus_client import generate_latest

from serving.acceptance import Acceptance
from serving.door.rollout import Split
from serving.fleet import Fleet
from serving.judgement import Plan, Sample, fault, slowness
from serving.releases import put_in_use
from serving.rollout import Rollout
from serving.runtime.team_draft import draft
from serving.wheel import ServerError
from tests.support import LOGS, NOON, PATIENCE_S, PatientClient, logged, on_free_ports, quiet, wait_until
from tests.system.serving.test_publish import answer, items_of, newest, other_values, ports_of
from tests.system.serving.test_versions import HISTORY, as_served, publish_with_other_items
from vivace.impressions.files import DRAFTED_FROM
from vivace.run import Run

USERS = [f"visitor {n}" for n in range(30)] + ["ünïcode-ß", "日本", "😀 smile", 'quote"d\\']


@pytest.fixture(scope="module")
def shop(root, tmp_path_factory) -> Iterator[tuple[Run, Fleet, Path]]:
    """The small shop with a second version, and a server of the first behind the guard, which logs what it shows."""
    run = as_served(root, tmp_path_factory.mktemp("rollout"))
    first = run.repository.resolve()
    publish_with_other_items(run)
    with Fleet(on_free_ports(first, guard=True, **LOGS), quiet) as fleet:
        yield run, fleet, newest(run)


@pytest.fixture
def two(shop) -> Iterator[tuple[Run, Fleet, Path]]:
    """(run, server, second version), and no trial left afterwards."""
    put_in_use(shop[1].release, shop[0].repository)  # newer versions are made of it
    yield shop
    shop[1].end_trial(quiet)


class Visitors:
    """One call after the other of many users over gRPC, while the block runs: (user, first items) of each."""

    def __init__(self, port: int) -> None:
        self.answers: list[tuple[str, list[str]]] = []
        self.errors: list[str] = []
        self._port, self._stop = port, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(3)]

    def _run(self, number: int) -> None:
        with PatientClient(f"127.0.0.1:{self._port}") as client:
            count = 0
            while not self._stop.is_set():
                user, count = f"caller {number} {count % 40}", count + 1
                try:
                    self.answers.append((user, client.recommend(user, HISTORY, 5, context=NOON).items))
                except Exception as error:
                    self.errors.append(str(error))

    def __enter__(self) -> Visitors:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def over_json(port: int, user: str, escaped: bool, **parameters: str) -> tuple[list[str], str]:
    """(items, header of the variant) of a call in plain JSON by someone who says that he is on trial."""
    inputs = [
        {"name": name, "datatype": kind, "shape": shape, "data": data}
        for name, kind, shape, data in (
            ("TOP_K", "INT32", [1, 1], [5]), ("HISTORY", "BYTES", [1, 2], [HISTORY]),
            ("QUERY", "BYTES", [1, 1], [[""]]), ("USER_ID", "BYTES", [1, 1], [user]),
            ("CONTEXT", "BYTES", [1, 1], [json.dumps(NOON)]),
        )
    ]  # fmt: skip
    body = json.dumps({"inputs": inputs, "parameters": parameters}, ensure_ascii=escaped).encode()
    headers = {"x-vivace-variant": "trial", "x-vivace-rollout": "4294967296 mine"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/v2/models/recommend/infer", body, headers)
    with urllib.request.urlopen(asked, timeout=PATIENCE_S) as got:
        outputs = {o["name"]: o["data"] for o in json.load(got)["outputs"]}
        return outputs["ITEM_ID"], got.headers.get("x-vivace-variant", "")


def test_a_share_of_the_users_gets_it_and_nobody_notices_its_death(two):
    run, fleet, second = two
    served = answer(fleet)[0][:5]
    split = Split("salt-3", 0.4)
    rollout = Rollout(fleet, Plan(version=2, salt=split.salt, shares=(split.share,)), quiet)
    rollout.start(second, Acceptance([]), quiet)
    assert {split.takes(user) for user in USERS[-4:]} == {True, False}, "another salt: both kinds are wanted"
    ports = ports_of(fleet)
    with (
        PatientClient(f"127.0.0.1:{ports['grpc']}") as grpc,
        PatientClient(f"127.0.0.1:{ports['http']}", "http") as http,
    ):
        for n, user in enumerate(USERS):
            answers = [client.recommend(user, HISTORY, 5, context=NOON).items for client in (grpc, http)]
            items, variant = over_json(ports["http"], user, escaped=bool(n % 2))
            on_trial = [items != served for items in (*answers, items)]
            assert on_trial == [split.takes(user)] * 3 and (variant == "trial") == split.takes(user), user
        for user in USERS[-4:]:
            row = logged(run.root, grpc.recommend(user, HISTORY, 5).request_id)
            arm = ("trial", "2") if split.takes(user) else (LOGS["variant"], "1")
            assert (row["variant"], row["model_version"]) == arm
        for session in USERS[:8]:  # anonymous: by their sessions, if they name one
            assert over_json(ports["http"], "", True, session=session)[1] == ("trial" * split.takes(session))
            assert (grpc.recommend("", HISTORY, 5, context=NOON, session=session).items != served) == split.takes(
                session
            )
        assert grpc.recommend("", HISTORY, 5, context=NOON).items == served
        with pytest.raises(ServerError, match=r"on trial; 'vivace rollout promote' or 'vivace rollout stop' first"):
            fleet.serve(newest_of_another(run), Acceptance([]), quiet)
        with Visitors(ports["grpc"]) as visitors:
            wait_until(lambda: len(visitors.answers) > 100, "answers")
            os.kill(fleet.trial.server.pid, signal.SIGKILL)
            seen = len(visitors.answers)
            wait_until(lambda: len(visitors.answers) > seen + 300 or visitors.errors, "answers after its death")
            wait_until(lambda: rollout.look() or rollout.result, "an end of the trial")
            assert "its tritonserver ended by itself" in rollout.result
            seen = len(visitors.answers)
            wait_until(lambda: len(visitors.answers) > seen + 50, "answers after its end")
        assert visitors.errors == []
        given = {(split.takes(user), items != served) for user, items in visitors.answers}
        assert {(True, True), (False, False)} <= given and (False, True) not in given
        assert all(items == served for _, items in visitors.answers[seen + 3 :])
    assert fleet.trial is None and list(fleet.by_name()) == ["0"]


def test_its_users_get_drafts_of_both_versions_and_the_log_names_the_teams(two):
    run, fleet, second = two
    rollout = Rollout(fleet, Plan(version=2, salt="s", shares=(0.5,), interleave=True), quiet)
    rollout.start(second, Acceptance([]), quiet)
    with PatientClient(f"127.0.0.1:{ports_of(fleet)['grpc']}") as grpc:
        served = grpc.recommend("", HISTORY, 20, context=NOON)
        tried = dict(zip(served.items, items_of(second, fleet, 20), strict=True))
        both = (served.items, list(tried.values()))
        scores = [dict(zip(items, served.scores.tolist(), strict=True)) for items in both]
        heads = [dict(zip(items, served.heads["click"].tolist(), strict=True)) for items in both]
        users = [user for user in USERS if Split("s", 0.5).takes(user)]
        for user in users:
            got = grpc.recommend(user, HISTORY, 20, context=NOON)
            drafted = draft(*both, 20, got.request_id, "s")
            assert got.items == drafted.items and got.status == served.status
            of = [scores[team][item] for team, item in zip(drafted.teams, drafted.items, strict=True)]
            assert got.scores == pytest.approx(of, abs=1e-4), "each score is that of the version that picked"
            of = [heads[team][item] for team, item in zip(drafted.teams, drafted.items, strict=True)]
            assert got.heads["click"] == pytest.approx(of, abs=1e-4)
        row = logged(run.root, got.request_id)
        assert row["team"] == drafted.credited("12")
        assert [row[name] for name in DRAFTED_FROM] == [list(both[0]), both[1]]
        assert (row["items"], row["variant"], row["model_version"]) == (got.items, "trial", "2")
        other = next(user for user in USERS if user not in users)
        assert logged(run.root, grpc.recommend(other, HISTORY, 5).request_id)["team"] == [""] * 5
    rollout.stop("the test has seen enough")


def newest_of_another(run: Run):
    publish_with_other_items(run)
    return newest(run)


def slowed(run: Run) -> None:
    """The newest version's ranker gets slower by a product of two large matrices, and answers the same."""
    with other_values(newest(run)) as (graph, sound, output):
        graph.initializer.append(numpy_helper.from_array(np.ones((1200, 1200), np.float32), "large"))
        graph.initializer.append(helper.make_tensor("nothing", TensorProto.FLOAT, [], [0.0]))
        graph.node.extend(
            [
                helper.make_node("ReduceMax", [sound], ["largest"], keepdims=0),
                helper.make_node("Mul", ["large", "largest"], ["scaled"]),
                helper.make_node("MatMul", ["scaled", "large"], ["product"]),
                helper.make_node("ReduceMax", ["product"], ["one"], keepdims=0),
                helper.make_node("Mul", ["one", "nothing"], ["zero"]),
                helper.make_node("Add", [sound, "zero"], [output]),
            ]
        )


def test_copies_alone_come_first_and_then_the_users(two):
    _, fleet, second = two
    plan = Plan(version=2, salt="s", shares=(0.0, 0.5), shadow=1.0, least=20, wait_s=0.5, drift=0)
    rollout = Rollout(fleet, plan, quiet)
    with Visitors(ports_of(fleet)["grpc"]) as visitors:
        rollout.start(second, Acceptance([]), quiet)
        assert "answers nobody, and gets a copy of 100 % of the calls" in rollout.state()["lines"][-1]
        wait_until(lambda: rollout.look() or rollout.state()["step"] == 2 or rollout.result, "the second step")
        assert not rollout.result and fleet.trial.server.pid
        servers = (fleet.trial.server.pid, fleet.replicas[0].server.pid)
        assert len({os.getpriority(os.PRIO_PROCESS, pid) for pid in servers}) == 1
        seen = len(visitors.answers)
        wait_until(lambda: len(visitors.answers) > seen + 50 or visitors.errors, "answers of the second step")
        rollout.stop("enough")
    assert len({tuple(items) for _, items in visitors.answers[seen:]}) == 2 and visitors.errors == []


def test_a_version_that_is_slower_goes_by_itself_and_says_why(two):
    run, fleet, _ = two
    publish_with_other_items(run)
    slowed(run)
    lines: list[str] = []
    with Visitors(ports_of(fleet)["grpc"]) as visitors:
        rollout = Rollout(fleet, Plan(version=3, salt="s", shares=(0.5, 0.9), wait_s=300, least=20), lines.append)
        rollout.start(newest(run), Acceptance([]), quiet)

        def over() -> str:
            assert not rollout.look()
            time.sleep(0.1)
            return rollout.result

        wait_until(over, "the end of the trial")
        seen = len(visitors.answers)
        wait_until(lambda: len(visitors.answers) > seen + 20 or visitors.errors, "answers after its end")
        state = rollout.state()
    # on a busy machine it is so slow that it degrades its answers, which is seen first
    assert "a call takes" in rollout.result or "answers were not whole" in rollout.result
    assert rollout.result == state["result"] and state["share"] == 0
    assert visitors.errors == [] and any(rollout.result in line for line in lines)


def test_copies_are_compared_and_a_version_whose_scores_are_of_another_kind_goes_by_itself(two):
    run, fleet, _ = two
    publish_with_other_items(run)
    with other_values(newest(run)) as (graph, sound, output):
        graph.initializer.append(helper.make_tensor("lift", TensorProto.FLOAT, [], [1000.0]))
        graph.node.append(helper.make_node("Add", [sound, "lift"], [output]))
    plan = Plan(version=4, salt="s", shares=(0.0, 0.4), shadow=1.0, least=20)
    with Visitors(ports_of(fleet)["grpc"]) as visitors:
        alike = set(answer(fleet)[0][:5]) & set(items_of(newest(run), fleet))
        rollout = Rollout(fleet, plan, quiet)
        rollout.start(newest(run), Acceptance([]), quiet)
        served_pid, trial_pid = fleet.replicas[0].server.pid, fleet.trial.server.pid
        of_served = os.getpriority(os.PRIO_PROCESS, served_pid)
        assert os.getpriority(os.PRIO_PROCESS, trial_pid) == min(of_served + 5, 19)
        seen = len(visitors.answers)
        assert "vivace_rollout_overlap " in generate_latest(fleet.registry).decode()
        while not rollout.result:
            assert not rollout.look()
            time.sleep(0.1)
    compared = rollout.state()["compared"]
    assert "the median score of the first item is" in rollout.result and compared["score_shift"] > 3
    assert len({tuple(items) for _, items in visitors.answers[seen:]}) == 1  # copies alone: nobody sees another answer
    copies = compared["copies"]
    assert copies["compared"] > 0 and copies["overlap"] == pytest.approx(len(alike) / 5, abs=0.2)
    assert copies["moved"] > 3 and copies["tried_ms"] > 0
    assert (
        visitors.errors == []
        and not fleet.options.answers.exists()
        and "vivace_rollout" not in generate_latest(fleet.registry).decode()
    )


SERVED = Sample(calls=1000, failed=2, seconds=9.98, rows=1000, partial=100)


@pytest.mark.parametrize(
    ("trial", "why"),
    [
        (Sample(100, 0, 1.0, 100, 10), ""),
        (Sample(100, 1, 1.0, 100, 10), ""),  # one in a hundred: chance
        (Sample(100, 5, 1.0, 100, 10), "5 of 100 calls failed, of the served version 2 of 1000"),
        (Sample(49, 49, 0.0, 0, 0), ""),  # too few to judge by
        (Sample(100, 0, 1.0, 100, 30), "30 of 100 answers were not whole, of the served version 100 of 1000"),
        (Sample(100, 0, 1.4, 100, 10), ""),
        (Sample(100, 0, 1.6, 100, 10), "a call takes 16.0 ms, and 10.0 ms in the served version"),
    ],
    ids=["as good", "one failure", "failures", "few", "partial", "a little slower", "slower"],
)
def test_what_a_version_on_trial_goes_for(trial, why):
    plan = Plan(version=2, salt="s")
    assert (fault(plan, trial, SERVED) or slowness(plan, trial, SERVED)) == why
    fast = Sample(1000, 0, 2.0, 1000, 100)  # 2 ms and 3.5 ms: a difference that nobody waits for
    assert slowness(plan, Sample(100, 0, 0.35, 100, 10), fast) == ""
    own = Sample(calls=120, failed=0, seconds=9.0, rows=3, partial=3)  # the server's own questions: no user's
    assert fault(plan, own, SERVED) == slowness(plan, own, SERVED) == ""


@pytest.mark.parametrize(
    ("shares", "shadow"), [((0.0, 0.1), 0.0), ((0.0,), 0.5), ((0.0, 0.0, 0.1), 0.5), ((0.1, 0.0), 0.5), ((), 0.5)]
)
def test_a_step_without_users_comes_first_and_with_copies(shares, shadow):
    with pytest.raises(ValueError, match="shares: expected"):
        Plan(version=2, salt="s", shares=shares, shadow=shadow)


def test_users_are_dealt_evenly_and_independently_of_other_rollouts():
    users = [f"user-{n}" for n in range(20_000)]
    one, other = Split("a", 0.1), Split("b", 0.1)
    taken = [one.takes(user) for user in users]
    assert np.mean(taken) == pytest.approx(0.1, abs=0.01)
    assert np.mean([other.takes(user) for user, t in zip(users, taken, strict=True) if t]) == pytest.approx(
        0.1, abs=0.03
    )
    wider: Callable[[str], bool] = Split("a", 0.2).takes
    assert all(wider(user) for user, t in zip(users, taken, strict=True) if t), "who is on trial stays in the next step"
    steps = [Split("a", share, 0.5) for share in (0.05, 0.25, 0.5)]
    sides = [[(split.takes(user), split.compares(user)) for user in users] for split in steps]
    for before, after in pairwise(sides):  # nobody changes sides, and both grow alike
        assert all(now == then for then, now in zip(before, after, strict=True) if any(then))
    for split, side in zip(steps, sides, strict=True):
        assert not any(all(both) for both in side)
        assert np.mean(side, axis=0) == pytest.approx([split.share, split.share], abs=0.015)
    assert not steps[0].compares("") and all(one.takes(user) != one.compares(user) for user in users)
    assert not Split("a", 1.0).takes("") and Split("a", 1.0).takes("x") and not Split("a", 0.0).takes("x")
    for wrong in ({"salt": "a b", "share": 0.1}, {"salt": "a", "share": 1.1}, {"salt": "a", "share": 0.5, "most": 0.4}):
        with pytest.raises(ValueError, match="expected"):
            Split(**wrong)
