"""The page of ``vivace ui`` in a real browser over the real server: what people do on it, what strangers may not."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serving.start_checks import free_port
from serving.status import start_status_page
from tests.support import PatientClient, wait_until
from vivace import contract
from vivace.cli.page import judged, watch
from vivace.cli.page.app import answered, make_app
from vivace.cli.page.catalogue import Catalogue
from vivace.cli.page.load import Load
from vivace.cli.page.operations import Operations
from vivace.cli.page.served import Served
from vivace.run import Run

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
HOSTILE = "<img src=x onerror=\"document.body.dataset.hacked='1'\"><script>document.body.dataset.hacked='1'</script>"
PATIENCE_MS = 20_000
OPERATOR_KEY = "of the test"
expect.set_options(timeout=PATIENCE_MS)


class Relay:
    """Hands bytes on to a port, until it is cut: for callers a server that is away."""

    def __init__(self, port: int) -> None:
        self._to, self._open = port, []
        self.restore()

    def restore(self) -> None:
        """Listens, at another port than before."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = listening.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                self._open += [caller, server]
                for a, b in ((caller, server), (server, caller)):
                    threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                sink.sendall(part)
        sink.close()

    def cut(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        while self._open:
            with contextlib.suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The small shop, whose titles are hostile."""
    copy = tmp_path_factory.mktemp("page") / "shop"
    (copy / "features").mkdir(parents=True)
    for folder in (root, root / "features"):
        for path in folder.iterdir():
            if path.name not in ("features", "catalogue.parquet", "servers"):
                (copy / path.relative_to(root)).symlink_to(path)
    items = pd.read_parquet(root / "features" / "catalogue.parquet")
    items[contract.TITLE] = items[contract.TITLE] + HOSTILE
    items.to_parquet(copy / "features" / "catalogue.parquet")
    return Run(copy)


@pytest.fixture(scope="module")
def relay(served) -> Iterator[Relay]:
    relay = Relay(served[0].grpc_port)
    yield relay
    relay.cut()


@pytest.fixture(scope="module")
def watched_relays(fleet) -> Iterator[tuple[Relay, Relay]]:
    """Before the server's metrics and its status page."""
    status_port = free_port("127.0.0.1")
    start_status_page("127.0.0.1", status_port, fleet)
    relays = Relay(fleet.replicas[0].server.metrics_port), Relay(status_port)
    yield relays
    for relay in relays:
        relay.cut()


@pytest.fixture(scope="module")
def url(run: Run, relay: Relay, watched_relays) -> Iterator[str]:
    """The page's own address, over the small shop's server."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    served, catalogue = Served(lambda: relay.address, "grpc", {}, "vivace serve --name shop"), Catalogue(run)
    ports = lambda: (watched_relays[0].address, watched_relays[1].address)  # noqa: E731
    operations = Operations(run, run.root.parent, ports, {}, OPERATOR_KEY)
    watched = watch.routes(operations, Load("grpc", {}), lambda: relay.address, catalogue.some_users)
    app = make_app(served, catalogue, "shop", port, (*watched, *judged.routes(judged.Judged(run), answered)))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
    served.close()
    catalogue.close()  # no process opens a store twice


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with (
        sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        yield browser


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The person's view with an answer; nobody but the page's own host is called, and nothing goes wrong unseen."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    called: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: called.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(url)
    page.wait_for_selector(".card")
    yield page
    assert {u for u in called if not u.startswith(f"{url}/")} == set()
    assert faults == []
    assert page.evaluate("document.body.dataset.hacked ?? ''") == ""
    context.close()


def items_of(page: Page) -> list[str]:
    return page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.item)")


@contextlib.contextmanager
def redrawn(page: Page) -> Iterator[None]:
    """Until what is done in the block has been answered and drawn."""
    before = page.get_attribute("body", "data-drawn")
    yield
    expect(page.locator("body")).not_to_have_attribute("data-drawn", before)


def test_a_what_if_changes_the_answer_and_nothing_that_is_stored(page, served, root):
    answered, user = items_of(page), page.input_value("#person-input")
    assert len(answered) == 12 and HOSTILE in page.inner_text(".card h3")
    with redrawn(page):
        page.click(".card >> nth=3 >> button[data-type=buy]")
    assert "edited on this page alone" in page.inner_text(".edited")
    assert page.locator(".history li").first.locator(".tag").inner_text() == "buy"
    edited = items_of(page)
    assert answered[3] not in edited and edited != answered
    with PatientClient(f"127.0.0.1:{served[0].grpc_port}") as client:
        assert client.recommend(user, top_k=12).items == answered
    with redrawn(page):
        page.click("text=Back to what is stored")
    assert items_of(page) == answered
    with redrawn(page):
        page.click(".card >> nth=0 >> text=Skip")
    assert items_of(page)[:11] == answered[1:]


def test_reasons_name_what_is_in_the_history(page):
    history = page.locator(".history .what > span:first-child").all_inner_texts()
    page.click(".card >> nth=0 >> text=Why?")
    page.wait_for_selector(".sentence")
    named = page.locator(".reasons li > span").all_inner_texts()
    assert set(named) & set(history)
    assert "because of" in page.inner_text(".sentence").lower()
    shown = items_of(page)
    for place in range(1, len(shown)):
        page.click(f".card >> nth={place} >> text=Why?")
    paths = page.locator(".why .path")
    expect(page.locator(".card .sentence")).to_have_count(len(shown))
    assert paths.count() and " share " in paths.first.inner_text()
    with page.expect_response("**/api/why"):
        page.click(".why:has(.path) >> nth=0 >> text=中文")
    expect(paths.first).to_have_text(re.compile("相同：.*。$"))
    expect(page.locator(".why:has(.path) .sentence").first).to_have_text(re.compile("^(因为|并非)"))


def test_a_visitor_who_is_stored_by_keyboard_alone(page, served):
    page.get_by_role("button", name="New visitor").focus()
    with redrawn(page):
        page.keyboard.press("Enter")
    expect(page.locator(".status")).to_contain_text("Nothing is known of this person yet")
    expect(page.locator(".who")).to_contain_text("no stored history")
    user, first = page.input_value("#person-input"), items_of(page)[0]
    page.focus("#what-if")
    page.keyboard.press("ArrowDown")
    assert page.is_checked("#store")
    page.focus(".card >> nth=0 >> button[data-type=view]")
    page.keyboard.press("Enter")
    expect(page.locator(".who")).to_contain_text(f"1 stored events of {user}")
    expect(page.locator(".status")).to_contain_text("Answered in full")
    with PatientClient(f"127.0.0.1:{served[0].grpc_port}") as client:
        assert first not in client.recommend(user, top_k=12).items
    focused = "selector => Boolean(document.activeElement.closest(selector))"
    assert page.evaluate(focused, ".cards button"), "the item is gone, and the keyboard goes on beside it"
    page.focus(".history button")
    with redrawn(page):
        page.keyboard.press("Enter")
    assert page.evaluate(focused, ".history")


def test_the_page_goes_on_when_its_server_is_back(page, relay):
    answered = items_of(page)
    relay.cut()
    page.click(".card >> nth=0 >> button[data-type=view]")
    expect(page.locator("#away")).to_contain_text("does not answer. Start it with: vivace serve --name shop")
    relay.restore()
    expect(page.locator("#away")).to_be_hidden()
    expect(page.locator("#server")).to_contain_text(relay.address)
    expect(page.locator(".card").first).not_to_have_attribute("data-item", answered[0])


def test_an_operator_sees_load_come_and_go_and_changes_nothing_without_the_key(page, url):
    page.click("nav >> text=Operations")
    expect(page.locator("#operations .status").first).to_contain_text("Everything works. Version 1.")
    page.click("text=Send load")
    expect(page.locator("#operations")).to_contain_text(re.compile(r"[1-9]\d* sent, [1-9]\d* answered"))
    stages = page.locator("#operations table").first
    expect(stages.locator("tr", has_text="retrieval").locator("td").first).to_have_text(re.compile(r"[1-9]"))
    other = post(url, "/api/load", {"rate": 5, "seconds": 1})
    assert other[0] == 409 and "goes on already" in other[1]
    page.click("text=Stop")
    expect(page.locator("#operations")).to_contain_text("Stopped.")

    def answered() -> int:  # fewer where a queue of a busy machine refuses
        return json.loads((load_alone(url) or "{}").strip().split("data: ")[-1]).get("answered", 0)

    wait_until(lambda: answered() == 5, "a load of its own")
    for path, broken in itertools.product(
        ("/api/load", "/api/rollout", "/api/recommend"), ("{", "null", "[" * 100_000)
    ):
        assert post(url, path, broken, {"x-operator-key": OPERATOR_KEY})[0] == 400
    assert post(url, "/api/load", {"rate": 101})[0] == 400
    no_version = {"action": "start", "version": None}
    assert post(url, "/api/rollout", no_version, {"x-operator-key": OPERATOR_KEY})[0] == 400
    page.fill("#operator-key", "guessed")
    page.click("text=End the trial")
    expect(page.locator("#operations")).to_contain_text("needs the operator's key")
    status, body = post(url, "/api/rollout", {"action": "stop"}, {"x-operator-key": OPERATOR_KEY})
    assert status == 400 and "no running server" in body  # this server takes no orders: 'vivace serve' does


def test_operations_say_at_the_head_that_the_server_is_away(page, relay, watched_relays):
    page.click("nav >> text=Operations")
    expect(page.locator("#operations .status").first).to_contain_text("Everything works")
    for each in (relay, *watched_relays):
        each.cut()
    expect(page.locator("#server")).to_have_attribute("data-state", "away")
    expect(page.locator("#away")).to_contain_text("does not answer")
    for each in (relay, *watched_relays):
        each.restore()
    expect(page.locator("#server")).to_have_attribute("data-state", "ok")


def test_on_a_phone_people_are_offered_before_anything_is_typed(browser, url):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(".card")
    offered = page.get_by_role("list", name="People that match").get_by_role("button")
    before = page.input_value("#person-input")
    with redrawn(page):
        offered.nth(1).tap()
    assert page.input_value("#person-input") not in ("", before)
    context.close()


def test_the_models_are_shown_as_they_were_judged(page, run):
    table = json.loads((run.evaluation / "metrics.json").read_text())["table"]
    page.click("nav >> text=Models")
    for method, figures in table.items():
        row = page.locator("#models table").first.get_by_role("row", name=re.compile(rf"^{re.escape(method)} \d"))
        expect(row).to_contain_text(f"{figures['NDCG@10']:.4f}")
        low, high = map(float, re.findall(r"(0\.\d{4}) to (0\.\d{4})", row.inner_text())[0])
        assert low <= figures["NDCG@10"] <= high and low < high
    assert page.locator("img.figure").evaluate("image => image.naturalWidth") > 100
    assert page.locator("#models svg.chart").count() == 2


def test_load_ends_with_the_page_that_sent_it(browser, url):
    page = browser.new_page()
    page.goto(f"{url}/#operations")
    page.click("text=Send load")
    expect(page.locator("#operations")).to_contain_text(re.compile(r"[1-9]\d* sent"))
    page.close()
    assert wait_until(lambda: load_alone(url), "a load of its own")


@pytest.mark.parametrize(
    ("view", "scheme", "width"),
    [("person", "light", 1280), ("person", "dark", 390), ("operations", "dark", 1280), ("models", "light", 390)],
)
def test_axe_sees_no_violation(browser, url, view, scheme, width):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True
    )  # axe is a script of ours in the page
    page = context.new_page()
    page.goto(f"{url}/#{view}")
    if view == "person":
        page.click(".card >> nth=0 >> text=Why?")
        page.wait_for_selector(".sentence")
    else:
        page.wait_for_selector(f"#{view} table")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
    context.close()


def post(url: str, path: str, body: dict | str, headers: dict | None = None) -> tuple[int, str]:
    """(status, text) of a call as the page makes it."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    given = {"Origin": url, "Content-Type": "application/json", **(headers or {})}
    connection.request("POST", path, body if isinstance(body, str) else json.dumps(body), given)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def load_alone(url: str) -> str:
    """What a load of five requests tells; "" while another goes on."""
    status, body = post(url, "/api/load", {"rate": 5, "seconds": 1})
    assert status in (200, 409), body
    return body if status == 200 else ""


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/api/people?q=", {}, 200),
        ("GET", "/api/people?q=", {"Host": "evil.example"}, 403),
        ("GET", "/", {"Host": "evil.example:80"}, 403),
        ("GET", "/api/people?q=", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", "/api/append", {"Content-Type": "application/json"}, 403),
        ("POST", "/api/append", {"Origin": "http://evil.example", "Content-Type": "application/json"}, 403),
        ("POST", "/api/append", {"Origin": "self", "Content-Type": "text/plain"}, 415),
        ("POST", "/api/recommend", {"Origin": "self", "Content-Type": "application/json"}, 200),
        ("DELETE", "/api/append", {"Origin": "self"}, 405),
        ("GET", "/static/../app.py", {}, 404),
    ],
)
def test_strangers_are_refused(url, method, path, headers, status):
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    headers = {**headers, **({"Origin": url} if headers.get("Origin") == "self" else {})}
    connection.request(method, path, "{}" if method != "GET" else None, headers)
    response = connection.getresponse()
    assert response.status == status, response.read()
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    connection.close()
