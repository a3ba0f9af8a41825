"""Metrics of several servers as those of one address, told apart by the label ``replica``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.unix_http import UnixHandler, UnixServer
from vivace.http_pool import UnixConnection

log = logging.getLogger(__name__)
ASK_S = 2.0


def merged(of_replica: Mapping[str, Iterable[Metric]]) -> Iterator[Metric]:
    """Families of each replica as one family a name, its samples with the replica's name as the label ``replica``."""
    families: dict[str, Metric] = {}
    for replica, collected in of_replica.items():
        for family in collected:
            joint = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            joint.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
    yield from families.values()


def scraped(socket: Path, only: tuple[str, ...] = ()) -> list[Metric]:
    """What a tritonserver says behind its socket of metrics; nothing where it does not answer. ``only``: of the samples
    whose names begin so, without their types; all of a page take some 4 ms of a processor."""
    connection = UnixConnection(socket, ASK_S)
    try:
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
        if only:
            page = "".join(line for line in page.splitlines(keepends=True) if line.startswith(only))
        return list(text_string_to_metric_families(page))
    except (OSError, HTTPException, ValueError) as error:
        log.warning("metrics of %s: %s", socket, error)
        return []
    finally:
        connection.close()


class TritonMetrics:
    """``GET /metrics`` on the Unix socket ``path``, answered by asking each of the ``sockets`` at that moment; a
    context manager."""

    def __init__(self, path: Path, sockets: Callable[[], dict[str, Path]]) -> None:
        self._sockets = sockets

        class Handler(UnixHandler):
            def do_GET(handler) -> None:  # noqa: N802, N805
                handler.answer(200, generate_latest(self), CONTENT_TYPE_LATEST)  # type: ignore[arg-type]

        self._server = UnixServer(path, Handler)

    def collect(self) -> Iterator[Metric]:
        return merged({replica: scraped(socket) for replica, socket in self._sockets().items()})

    def __enter__(self) -> TritonMetrics:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
