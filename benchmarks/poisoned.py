"""What stops a version that is wrong, when, and whom it reaches first: trials of poisoned versions on a real server.

    python -m benchmarks.poisoned artifacts/shop --users 2000 --items 1000 --events 40000

The run is of the synthetic shop, whose users come, and click by its taste and by the place (``simulated_users``); each
click names its request. Poisons: scores that are no numbers, for every other newest item; a ranker that makes a call
three times as slow; the same popular items for everyone but for those they have seen; ids that mean other items. Each
is first put to what a version has to pass before a trial (``serving.acceptance``); then it is tried on ``--share`` of
the users, past that. Figures: seconds until the trial was ended by itself, why, the users that it reached and their
wrong answers; a version that is as good is tried as well. It works on a copy of the run. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from benchmarks.fault_kinds import copy_of, published_again
from benchmarks.simulated_users import EXAMINED
from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from preprocessing.readers.shop import Shop, ShopConfig
from serving.acceptance import Acceptance, recorded_calls
from serving.door.rollout import Split
from serving.fleet import Fleet
from serving.judgement import Plan, Sample
from serving.merged_metrics import scraped
from serving.releases import put_in_use, seal, version_of
from serving.rollout import Rollout
from serving.wheel import ServerError
from vivace import contract
from vivace.client import Recommendation, VivaceClient, VivaceError
from vivace.run import Run

TIMEOUT_S, TOP_K, WARM_S = 10.0, 10, 10.0
SALT, SEED = "poisoned", 7
SLOWER = 3.0
CTR = 0.08  # clicks a shown item of the served version
MATRIX = 512  # rows of the product whose time is measured
console = Console(width=140)
Graph = tuple[onnx.GraphProto, str, str]


class Visitors:
    """Users who come at random, in threads of their own, look at the answer and click. ``answers``: (time, user,
    answer) of each; ``errors``: of calls that failed, by their time. Leaving raises what ended a thread, as figures of
    fewer visitors than were meant are none."""

    def __init__(self, address: str, shop: Shop, qps: float, threads: int = 6) -> None:
        self._chance = np.exp(shop.wanted(np.arange(shop.config.users), *np.zeros((2, shop.config.users), np.int64)))
        self._scale = 1.0
        self._address, self._pause_s, self._stop = address, threads / qps, threading.Event()
        self.answers: list[tuple[float, str, Recommendation]] = []
        self.errors: list[tuple[float, str]] = []
        self._faults: list[Exception] = []
        self._threads = [threading.Thread(target=self._come, args=(n,)) for n in range(threads)]

    def _come(self, number: int) -> None:
        try:
            self._run(number)
        except Exception as error:
            self._faults.append(error)

    def _run(self, number: int) -> None:
        rng = np.random.default_rng([SEED, number])
        with VivaceClient(self._address, timeout_s=TIMEOUT_S) as client:
            due = time.monotonic()
            while not self._stop.wait(max(due - time.monotonic(), 0)):
                due += rng.exponential(self._pause_s)
                user = int(rng.integers(len(self._chance)))
                try:
                    self._visit(client, rng, user)
                except VivaceError as error:
                    self.errors.append((time.monotonic(), str(error)))

    def _visit(self, client: VivaceClient, rng: np.random.Generator, user: int) -> None:
        name = f"user-{user:05d}"
        answer = client.recommend(name, top_k=TOP_K)
        self.answers.append((time.monotonic(), name, answer))
        for item in np.array(answer.items)[rng.random(len(answer.items)) < self._clicked(name, answer)]:
            client.append(name, str(item), "view", request_id=answer.request_id)

    def _clicked(self, name: str, answer: Recommendation) -> np.ndarray:
        """Chance that each item of an answer is clicked, float64 [K]; none for one that was put in live, of which the
        generator knows no taste."""
        chance_V, numbers = self._chance[int(name[5:])], [int(item.rpartition("-")[2]) for item in answer.items]
        odds = self._scale * np.array([chance_V[n] if n < len(chance_V) else 0.0 for n in numbers])
        clicked: np.ndarray = odds / (1 + odds) * EXAMINED[: len(odds)]
        return clicked

    def click_so_often(self, ctr: float) -> None:
        """Scales clicks so that the answers until now would get ``ctr`` a shown item."""
        answers, low, high = list(self.answers), -3.0, 12.0
        for _ in range(20):
            self._scale = 10 ** ((low + high) / 2)
            got = np.mean([self._clicked(name, answer).mean() for _, name, answer in answers if answer.items])
            low, high = ((low + high) / 2, high) if got < ctr else (low, (low + high) / 2)

    def __enter__(self) -> Visitors:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._faults:
            raise self._faults[0]


# -- poisons -------------------------------------------------------------------------------------------
def _changed(release: Path, stage: str, output: int, change: Callable[[Graph], None]) -> None:
    """Lets ``change`` put nodes between what a graph works out and what it answers: (graph, name of the first, name of
    the second)."""
    path = next(release.glob(f"{stage}/*/model.onnx"))
    model = onnx.load(path)
    name = model.graph.output[output].name
    for node in model.graph.node:
        node.output[:] = [f"{n}_sound" if n == name else n for n in node.output]
        node.input[:] = [f"{n}_sound" if n == name else n for n in node.input]
    change((model.graph, f"{name}_sound", name))
    onnx.save(model, path)


def _constant(graph: onnx.GraphProto, name: str, values: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def no_numbers(release: Path) -> None:
    """Scores that are no numbers where the id of the newest item is even."""

    def change(parts: Graph) -> None:
        graph, sound, output = parts
        history = graph.input[0].name
        _constant(graph, "poison_last", np.array([-1], np.int64))
        _constant(graph, "poison_two", np.array(2, np.int64))
        _constant(graph, "poison_zero", np.array(0, np.int64))
        _constant(graph, "poison_shape", np.array([-1, 1, 1], np.int64))
        _constant(graph, "poison_nan", np.array(np.nan, np.float32))
        graph.node.extend([
            helper.make_node("Gather", [history, "poison_last"], ["poison_newest"], axis=1),
            helper.make_node("Mod", ["poison_newest", "poison_two"], ["poison_rest"]),
            helper.make_node("Equal", ["poison_rest", "poison_zero"], ["poison_even"]),
            helper.make_node("Reshape", ["poison_even", "poison_shape"], ["poison_where"]),
            helper.make_node("Where", ["poison_where", "poison_nan", sound], [output]),
        ])  # fmt: skip

    _changed(release, contract.RANKING, 1, change)


def product_ms(rows: int) -> float:
    """Milliseconds that the served kind of session takes for a product of two such matrices."""
    from vivace.onnx_session import open_session

    a = helper.make_tensor_value_info("a", TensorProto.FLOAT, [rows, rows])
    c = helper.make_tensor_value_info("c", TensorProto.FLOAT, [rows, rows])
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "a"], ["c"])], "product", [a], [c])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        session, feed, took = open_session(path), {"a": np.ones((rows, rows), np.float32)}, list[float]()
        for _ in range(15):
            began = time.monotonic()
            session.run(None, feed)
            took.append(1000 * (time.monotonic() - began))
    return float(np.median(took))


def slow(release: Path, more_ms: float) -> None:
    """A product of large matrices beside the ranker, of about ``more_ms``."""
    rows = max(round(MATRIX * (more_ms / product_ms(MATRIX)) ** (1 / 3)), 16)

    def change(parts: Graph) -> None:
        graph, sound, output = parts
        _constant(graph, "poison_large", np.zeros((rows, rows), np.float32))
        graph.node.extend([
            helper.make_node("ReduceMax", [sound], ["poison_largest"], keepdims=0),
            helper.make_node("Mul", ["poison_large", "poison_largest"], ["poison_scaled"]),
            helper.make_node("MatMul", ["poison_scaled", "poison_large"], ["poison_product"]),
            helper.make_node("ReduceMax", ["poison_product"], ["poison_zero"], keepdims=0),
            helper.make_node("Add", [sound, "poison_zero"], [output]),
        ])  # fmt: skip

    _changed(release, contract.RANKING, 1, change)


def popular(release: Path) -> None:
    """The smallest ids, which are the most frequent items, but for those that are excluded; ranked so too."""

    def of_retrieval(parts: Graph) -> None:
        graph, _, output = parts
        exclude = next(i for i in graph.input if i.type.tensor_type.elem_type == TensorProto.BOOL)
        items = exclude.type.tensor_type.shape.dim[1].dim_value
        count = graph.output[0].type.tensor_type.shape.dim[1].dim_value
        _constant(graph, "poison_count", np.array([count], np.int64))
        rank = np.where(np.arange(items) < contract.FIRST_ID, -1e9, -np.arange(items)).astype(np.float32)
        _constant(graph, "poison_rank", rank[None])
        _constant(graph, "poison_away", np.array(-1e9, np.float32))
        graph.node.extend([
            helper.make_node("Where", [exclude.name, "poison_away", "poison_rank"], ["poison_scores"]),
            helper.make_node("TopK", ["poison_scores", "poison_count"], ["poison_top", output], axis=1),
        ])  # fmt: skip

    def of_ranking(parts: Graph) -> None:
        graph, _, output = parts
        candidates = graph.input[1].name
        graph.node.append(helper.make_node("Identity", [candidates], [output]))

    _changed(release, contract.RETRIEVAL, 0, of_retrieval)
    _changed(release, contract.RANKING, 0, of_ranking)


def swapped(release: Path) -> None:
    """Ids mean other items: the frequent ones rare ones, and the other way round."""
    for path in release.glob("*/*/items.json"):
        items = json.loads(path.read_text())
        half = len(items) // 2
        path.write_text(json.dumps([*items[half:], *items[:half]]))


# -- trials --------------------------------------------------------------------------------------------
def tried(
    fleet: Fleet,
    release: Path,
    visitors: Visitors,
    share: float,
    seconds: float,
    wrong: Callable[[Recommendation], bool],
) -> dict[str, Any]:
    """How a trial of a version goes that nothing was asked of before."""
    plan = Plan(version=version_of(release), salt=SALT, shares=(share,), wait_s=10 * seconds)
    split, rollout = Split(SALT, share), Rollout(fleet, plan, lambda text: None)
    try:
        rollout.start(release, Acceptance([]), lambda text: None)
    except (ServerError, ValueError) as error:
        return {"refused": str(error)}
    began = time.monotonic()
    while not rollout.result and time.monotonic() - began < seconds:
        rollout.look()
        time.sleep(0.05)
    ended, compared = time.monotonic(), rollout.state()["compared"]
    clicks, why = compared["clicks"], rollout.result.partition(": ")[2]
    if not why:
        rollout.stop("nothing ended it")
    reached = [
        (user, answer) for at, user, answer in list(visitors.answers) if began < at < ended and split.takes(user)
    ]
    return {
        "ended_s": round(ended - began, 1) if why else None, "why": why, "users": len({user for user, _ in reached}),
        "answers": len(reached), "wrong": sum(wrong(answer) for _, answer in reached),
        "failed": sum(began < at < ended for at, _ in list(visitors.errors)), "clicks": clicks,
        "score_shift": compared["score_shift"],
    }  # fmt: skip


def accepted(fleet: Fleet, release: Path, accept: Acceptance) -> str:
    """What is said of a version before a trial, or why it is refused."""
    lines: list[str] = []
    try:
        fleet.begin_trial(release, accept, lines.append)
    except (ServerError, ValueError) as error:
        return f"refused: {error}"
    fleet.end_trial(lambda text: None)
    return f"accepted: {next((line for line in lines if 'recorded requests' in line), '')}"


def no_number(answer: Recommendation) -> bool:
    return not all(math.isfinite(score) for score in answer.scores)


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run of the synthetic shop")],
    users: Annotated[int, typer.Option(help="of the shop that the run was prepared from")] = ShopConfig.users,
    items: Annotated[int, typer.Option(help="of the same")] = ShopConfig.items,
    events: Annotated[int, typer.Option(help="of the same")] = ShopConfig.events,
    qps: Annotated[float, typer.Option(help="visits a second")] = 40.0,
    share: Annotated[float, typer.Option(help="of the users, on trial")] = 0.2,
    seconds: Annotated[float, typer.Option(help="of a trial that nothing ends")] = 90.0,
    profile: str = "fused",
) -> None:
    shop, run, rows = Shop(ShopConfig(users=users, items=items, events=events)), Run(root), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of(run, Path(folder) / "run")
        served = copy.repository.resolve()
        options = on_free_ports(copy.repository, profile, copy.server_log, guard=True)
        with Fleet(options, lambda text: None) as fleet:
            server = fleet.replicas[0].server
            with Visitors(f"{server.address}:{server.grpc_port}", shop, qps) as visitors:
                mean_ms(fleet, WARM_S)
                visitors.click_so_often(CTR)
                usual_ms = mean_ms(fleet, WARM_S)
                poisons: dict[str, tuple[Callable[[Path], None], Callable[[Recommendation], bool]]] = {
                    "as good": (lambda release: None, lambda answer: False),
                    "no numbers": (no_numbers, no_number),
                    "slow": (lambda release: slow(release, (SLOWER - 1) * usual_ms), lambda answer: False),
                    "popular items": (popular, lambda answer: True),
                    "swapped ids": (swapped, lambda answer: True),
                }
                for name, (poison, wrong) in poisons.items():
                    release = published_again(copy)
                    put_in_use(served, copy.repository)
                    poison(release)
                    seal(release)
                    before = accepted(fleet, release, Acceptance(recorded_calls(copy)))
                    row = {"before": before, **tried(fleet, release, visitors, share, seconds, wrong)}
                    rows[name] = row
                    console.print(name, row)
                    shutil.rmtree(release, ignore_errors=True)
                    assert fleet.release == served
    print(
        record_line(
            "poisoned versions", data=root.name, profile=profile, qps=qps, share=share, limit_s=seconds,
            mean_ms=usual_ms, rows=rows,
        )
    )  # fmt: skip


def mean_ms(fleet: Fleet, seconds: float) -> float:
    """Of a call in the served version over the next seconds, as the rollout sees it."""
    sockets = fleet.replicas[0].server.sockets
    assert sockets is not None
    first = Sample.of(scraped(sockets.metrics))
    time.sleep(seconds)
    return (Sample.of(scraped(sockets.metrics)) - first).mean_ms


if __name__ == "__main__":
    typer.run(main)
