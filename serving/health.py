"""Whether a server works, part by part: each is looked at again and again, and red says why.

The ensemble is asked, as the guard asks it, a question whose answer is known; the rest is looked at from outside. What
comes of it: ``/health``, ``/ready`` and metrics of the status port, the readiness that the guard answers in Triton's
place, and whom of several the guard asks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import lmdb
from prometheus_client import CollectorRegistry, Counter, Gauge
from tritonclient.utils import InferenceServerException

from serving.launcher import TritonServer
from serving.releases import DamagedError, signatures, verify
from serving.runtime.new_items import TABLES
from serving.runtime.rules import rules_file
from serving.segments import SHM
from vivace import contract
from vivace.client import VivaceClient, VivaceError
from vivace.context import CONTEXT_FILE, ContextColumns
from vivace.live import RECENT
from vivace.store.interface import StoreError
from vivace.store.opening import open_store
from vivace.store.retention import Retention

log = logging.getLogger("vivace.serve")

LOOK_S = 0.25  # how often what is cheap to see is looked at
SLOW_S = 5.0  # and the rest: a file is written, the repository compared
CANARY_S = 1.0  # how often the ensemble is asked
CANARY_WAIT_S = 10.0
BUSY_S = 30.0  # a queue that refuses is no fault of the ensemble, for so long
MIN_FREE_BYTES = 64 << 20
RULES_S = 3.0  # within which all workers have taken a change of the business rules
BUSY = ("exceeds maximum queue size", "timeout expired")  # Triton's words where a queue refuses
PARTS = ("server", "guard", "watchdog", "models", "ensemble", "store", "disk", "version")
SHARD_PARTS = ("server", "watchdog", "models", "disk", "version")  # of a server that is a shard


class Canary:
    """A question to ``recommend`` whose answer is kept from the first time that it was answered in full: items that the
    served catalogue has, best first. ``fault`` is "" while the answer stays the same, or the catalogue has changed."""

    def __init__(self, server: TritonServer, registry: CollectorRegistry) -> None:
        self.server = server
        self.expected: list[str] | None = None
        self._live = any(server.options.repository.glob(f"*/*/{RECENT}"))
        self._follows = any(server.options.repository.glob(f"*/*/{TABLES}"))
        self._number = 0  # of the newest change of the catalogue that the answer may know
        self._shared = server.options.store  # a store that may be away while the ensemble works
        self._rules, self._ruled_since = 0, -math.inf
        self.fault = "not asked yet"
        self._last_good = time.monotonic()
        self._client: VivaceClient | None = None
        self.context = self._noon()
        items = self._items()
        self._history, self._catalogue = items[: min(3, max(1, len(items) - 1))], set(items)  # something is left
        self.failures = Counter(
            "vivace_canary_failures", "Canary requests without the known answer", ["why"], registry=registry
        )
        self.seconds = Gauge("vivace_canary_seconds", "Time of the last canary's answer", registry=registry)

    def _items(self) -> list[str]:
        """Item ids of the served version, most popular first."""
        for path in sorted(self.server.release.glob(f"{contract.RESPONSE}/*/items.json")):
            return [str(item) for item in json.loads(path.read_text(encoding="utf-8"))]
        return []

    def _noon(self) -> dict[str, str]:
        """A moment that stays the same, where the models read the clock: by that of the server the right answer would
        change from hour to hour."""
        for path in self.server.release.glob(f"{contract.FEATURE_TRANSFORM}/*/{CONTEXT_FILE}"):
            names = ContextColumns.load(path).categoricals
            return {name: value for name, value in ((contract.HOUR, "12"), (contract.WEEKDAY, "2")) if name in names}
        return {}

    def ask(self) -> str:
        """Asks once; what is wrong, or ""."""
        started, why, problem = time.monotonic(), "error", ""
        try:
            if self._client is None:
                self._client = self.server.client(CANARY_WAIT_S)
            nobody = f"canary {uuid.uuid4()}" if self.server.options.answer_cache is not None else ""  # computed anew
            answer = self._client.recommend(
                nobody, self._history, 10, context=self.context or None, request_id=contract.UNLOGGED
            )
            self.seconds.set(time.monotonic() - started)
            if not answer.degraded:
                why, problem = "answer", self._compare(answer.items, contract.STATUS_RULES in answer.status)
            elif not (
                answer.status.startswith("degraded: load")
                or (self._shared and "store: " in answer.status)
                or (self.server.options.shards and "shards: " in answer.status)
            ):
                why, problem = "answer", f"expected the status ok, got {answer.status!r}"
        except VivaceError as error:
            if any(sign in str(error) for sign in BUSY) and time.monotonic() - self._last_good < BUSY_S:
                return self.fault
            problem = str(error)
            self.close()  # a connection that waits for its next try would report an old failure
        if problem:
            self.failures.labels(why).inc()
        else:
            self._last_good = time.monotonic()
        return problem

    def _compare(self, items: list[str], by_rules: bool) -> str:
        strange = sorted(set(items) - self._catalogue)
        if self._rules_changed():
            self.expected = None
        if self._follows and (strange or items != self.expected) and (number := self._changed()) != self._number:
            self._number, self.expected = number, None  # what changed of the catalogue may change the answer
        if self._number:
            strange = []
        nothing = not items and len(self._catalogue) > len(self._history)  # of one item nothing is left
        if strange or (nothing and not by_rules):
            return f"expected items of the catalogue, got {strange[:3] or 'none'}"
        if self.expected is None or self._live:  # live counters change an answer from one second to the next
            self.expected = items
        return "" if items == self.expected else f"expected {self.expected[:3]}…, got {items[:3]}…: another answer"

    def _rules_changed(self) -> bool:
        """Whether the business rules are others than a moment ago: workers take them one after the other."""
        try:
            stamp = (self.server.options.rules or rules_file(self.server.release)).stat().st_mtime_ns
        except OSError:
            stamp = 0
        if stamp != self._rules:
            self._rules, self._ruled_since = stamp, time.monotonic()
        return time.monotonic() - self._ruled_since < RULES_S

    def _changed(self) -> int:
        """Number of the newest change of the catalogue; -1 where the store does not say."""
        try:
            folder = self.server.release.parent / "feature_store"
            with contextlib.closing(open_store(folder, readonly=True, url=self._shared)) as store:
                return store.last_change()
        except (lmdb.Error, OSError, StoreError):
            return -1

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def store_fault(folder: Path, identity: tuple[int, int] | None) -> str:
    """Why the store in ``folder`` cannot be trusted with events, or "". ``identity``: device and inode of its file when
    the server opened it."""
    data = folder / "data.mdb"
    if not data.exists():
        return f"no store at {folder}: what is appended goes nowhere; restore it and start the server again"
    if identity is not None and file_identity(data) != identity:
        return f"{data}: another file than the server opened; start the server again"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        with data.open("r+b"):
            pass
    except OSError as error:
        return f"{folder}: cannot be written to: {error.strerror}"
    return ""


class SharedStore:
    """Asks a Valkey for the number of its newest event."""

    def __init__(self, url: str, folder: Path) -> None:
        from vivace.store.remote.store import ValkeyStore

        self._store = ValkeyStore(url, Retention.of(folder))

    def fault(self) -> str:
        try:
            self._store.last_event()
        except StoreError as error:
            return f"{error}; events are refused and answers are degraded until it answers"
        return ""


def file_identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class Health:
    """A context manager that looks inside; ``faults`` by part, "" where all is well. ``others``: parts by name that
    someone else judges."""

    def __init__(self, server: TritonServer, registry: CollectorRegistry, others: dict[str, Callable[[], str]]) -> None:
        self.server = server
        self.starting = ""  # why it is not ready yet, for whoever warms it up
        self.faults = {name: "not looked at yet" for name in (PARTS if server.options.shard is None else SHARD_PARTS)}
        self.canary = Canary(server, registry) if server.options.shard is None else None
        self.slow_s = SLOW_S
        self._others = others
        self._stop = threading.Event()
        self._store = server.release.parent / "feature_store"
        self._identity = file_identity(self._store / "data.mdb")
        self._shared = SharedStore(server.options.store, self._store) if server.options.store else None
        self._signatures = signatures(server.release)
        self._version = ", ".join(sorted({p.name for p in server.release.glob("*/*") if p.name.isdigit()}))
        self._next_slow = 0.0
        self._part = Gauge("vivace_health", "1 while this part works", ["part"], registry=registry)
        self._ready = Gauge("vivace_ready", "1 while every part works", registry=registry)
        self._free = Gauge("vivace_disk_free_bytes", "Left on the file system of", ["folder"], registry=registry)
        self._threads = [
            threading.Thread(target=self._every, args=(period, work), name=f"health: {name}", daemon=True)
            for name, period, work in (("parts", LOOK_S, self.look), ("canary", CANARY_S, self.ask))
        ]

    def __enter__(self) -> Health:
        self.ask()
        self.look()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=CANARY_WAIT_S + 5)
        if self.canary is not None:
            self.canary.close()

    # -- for those who ask ---------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        faults = {part: fault for part, fault in self.faults.items() if part != "store" or self._shared is None}
        return not self.starting and not any(faults.values())  # every replica would be red for a store that is away

    @property
    def answers(self) -> bool:
        """Whether calls shall come to this server while there are others."""
        return not self.starting and not any(self.faults.get(part) for part in ("server", "models", "ensemble"))

    def report(self) -> dict[str, object]:
        """What ``/health`` answers."""
        parts = {name: {"ok": not fault, **({"why": fault} if fault else {})} for name, fault in self.faults.items()}
        more = {"why": self.starting} if self.starting else {}
        return {"ready": self.ready, **more, "version": self._version, "parts": parts}

    # -- looking -------------------------------------------------------------------------------------
    def ask(self) -> None:
        """One question to the ensemble; none while there is no server to ask."""
        if self.canary is not None and self.server.running() and not self.faults["server"].startswith("tritonserver"):
            self.canary.fault = self.canary.ask()

    def look(self) -> None:
        """One round over all parts."""
        slow = time.monotonic() >= self._next_slow
        checks: dict[str, Callable[[], str]] = {
            "server": self._server_fault, "guard": self._guard_fault,
            "ensemble": lambda: self.canary.fault if self.canary is not None else "", **self._others,
        }  # fmt: skip
        if slow:
            self._next_slow = time.monotonic() + self.slow_s
            checks |= {
                "store": self._shared.fault if self._shared else lambda: store_fault(self._store, self._identity),
                "disk": self._disk_fault,
                "version": self._version_fault,
            }
        for name, check in checks.items():
            if name not in self.faults:
                continue
            try:
                fault = check()
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            if fault != self.faults[name] and bool(fault) != bool(self.faults[name]):
                log.log(logging.WARNING if fault else logging.INFO, "health: %s: %s", name, fault or "works")
            self.faults[name] = fault
            self._part.labels(name).set(not fault)
        self._ready.set(self.ready)

    def _every(self, period_s: float, work: Callable[[], None]) -> None:
        while not self._stop.wait(period_s):
            try:
                work()
            except Exception:
                log.exception("health")

    def _server_fault(self) -> str:
        if not self.server.running():
            return "tritonserver: ended; it is started again"
        return "" if self.server.ready() else "tritonserver: not all of its models are ready"

    def _guard_fault(self) -> str:
        door = self.server.door
        if door is None:
            return ""
        if not door.running():
            return "Envoy: ended; it is started again"
        return "" if door.answers() else "Envoy: does not answer"

    def _disk_fault(self) -> str:
        folders = {
            "store": self._store,
            "log": (self.server.log or self._store).parent,
            "shared memory": SHM,
        }
        low = []
        for name, folder in folders.items():
            if not folder.exists():
                continue
            disk = shutil.disk_usage(folder)
            least = min(MIN_FREE_BYTES, disk.total // 10)
            self._free.labels(name).set(disk.free)
            if disk.free < least:
                low.append(f"{name}: {disk.free >> 20} MiB left in {folder}, expected {least >> 20} and more")
        return "; ".join(low)

    def _version_fault(self) -> str:
        """Files as they were published, and one version among the models that are loaded."""
        release = self.server.release
        now = signatures(release)
        if now != self._signatures:
            try:
                verify(release)
            except DamagedError as error:
                return str(error)
            self._signatures = now
        if not self.server.running():
            return self.faults["version"]
        try:
            with self.server.control_client() as client:
                index = client.get_model_repository_index(client_timeout=CANARY_WAIT_S).models
        except InferenceServerException:
            return self.faults["version"]  # of the server's part
        versions = {m.name: m.version for m in index if m.state == "READY"}
        if len(set(versions.values())) > 1:
            return f"expected one version of all models, got {versions}"
        return ""
