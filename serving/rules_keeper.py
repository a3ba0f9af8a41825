"""Keeps the business rules that a server follows: a file that says nothing that can be done never reaches a worker, and
a worker or a version that starts later has the rules of the others.

Workers read the copy that was accepted last (``serving.runtime.rules.ENVIRONMENT``), in a folder of the server's own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from serving.runtime.rules import RulesError, read_rules
from serving.start_checks import check_rules
from serving.wheel import ServerError

LOOK_S = 0.5


class RulesKeeper:
    """A context manager that looks at ``source`` and copies what it accepts to ``accepted``. ``releases``: the versions
    whose items the rules are for. ``fault``: why the file as it is now is not followed, "" while it is. Raises
    ServerError for rules that cannot be followed when it is entered."""

    def __init__(
        self, source: Path, accepted: Path, releases: Callable[[], list[Path]], say: Callable[[str], None]
    ) -> None:
        self.source, self.accepted, self.fault = source, accepted, ""
        self._releases, self._say = releases, say
        self._seen: str | None = None
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="rules", daemon=True)

    def __enter__(self) -> RulesKeeper:
        self.look()
        if self.fault:
            raise ServerError(self.fault)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def check(self, release: Path) -> None:
        """Raises ServerError where a version cannot follow the rules that are accepted."""
        try:
            check_rules(release, self.accepted)
        except ServerError as error:
            raise ServerError(f"{release.name}: {str(error).replace(str(self.accepted), str(self.source))}") from None

    def look(self) -> None:
        """Takes the file as it is now, or says why not."""
        with self._lock:
            try:
                text, fault = read_rules(self.source), ""
                if text != self._seen:
                    for release in self._releases():
                        check_rules(release, self.source, text)
                    self._put(text)
                    self._seen = text
            except (RulesError, ServerError, OSError) as error:
                fault = f"{error}" if isinstance(error, ServerError) else f"{self.source}: {error}"
            if fault and fault != self.fault:
                self._say(f"{fault}; the rules before it stay")
            self.fault = fault

    def _put(self, text: str) -> None:
        if not text:
            self.accepted.unlink(missing_ok=True)
            return
        beside = self.accepted.with_name(f".{self.accepted.name}")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.accepted)

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            self.look()

    # -- metrics -------------------------------------------------------------------------------------
    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily("vivace_rules_followed", "1 while the business rules are followed as their file is")
        gauge.add_metric([], float(not self.fault))
        yield gauge
