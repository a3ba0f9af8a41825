"""The page as an ASGI application: its files, and JSON for its views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from loadtest.reports.record import finite
from vivace.cli.page.bodies import body_of
from vivace.cli.page.catalogue import Catalogue
from vivace.cli.page.person import Person
from vivace.cli.page.security import OnlyThisPage
from vivace.cli.page.served import AwayError, RefusedError, Served

STATIC = Path(__file__).with_name("static")


def answered(work: Callable[[], Any]) -> Response:
    """JSON of ``work()``; what is expected to go wrong as {"error": text for people}."""
    try:
        return JSONResponse(finite(work()))
    except AwayError as error:
        return JSONResponse({"error": str(error), "away": True}, 503)
    except RefusedError as error:
        return JSONResponse({"error": str(error)}, 502)
    except (ValueError, FileNotFoundError) as error:
        return JSONResponse({"error": str(error)}, 400)


def asks(work: Callable[[str], Any], parameter: str) -> Callable[[Request], Response]:
    """Endpoint of a GET with one parameter; Starlette runs it in a thread."""
    return lambda request: answered(lambda: work(request.query_params.get(parameter, "")))


def tells(work: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Any]:
    """Endpoint of a POST with a JSON object."""

    async def endpoint(request: Request) -> Response:
        try:
            raw = await body_of(request)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        return await run_in_threadpool(answered, lambda: work(raw))

    return endpoint


def about(served: Served, catalogue: Catalogue, name: str) -> dict[str, Any]:
    """What the page is over."""
    return {
        **served.about(),
        "run": name,
        "address": served.address,
        "local": catalogue.stores,
        "event_types": catalogue.event_types,
    }


def make_app(served: Served, catalogue: Catalogue, name: str, port: int, more: tuple[BaseRoute, ...] = ()) -> Any:
    """The application. ``name``: of the run, "" where it is not here; ``port``: of the page; ``more``: routes of
    other views."""
    person = Person(served, catalogue)
    routes = [
        Route("/", lambda request: FileResponse(STATIC / "index.html")),
        Route("/api/about", lambda request: answered(lambda: about(served, catalogue, name))),
        Route("/api/people", asks(person.people, "q")),
        Route("/api/items", asks(person.items, "q")),
        Route("/api/history", asks(person.history, "user")),
        Route("/api/recommend", tells(person.recommend), methods=["POST"]),
        Route("/api/append", tells(person.append), methods=["POST"]),
        Route("/api/why", tells(person.why), methods=["POST"]),
        *more,
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return OnlyThisPage(Starlette(routes=routes), port)
