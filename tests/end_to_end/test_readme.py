"""The commands of README.md and docs/*.md, run where that is cheap: `vivace query`, curl, the client call, `make`.

Pages with placeholders (USER, an address) are run with those of the small served shop.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocessing.requests import recorded
from tests.support import vivace
from vivace import contract
from vivace.manifest import CHECKOUT

PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
HISTORY_PAGES = {"log.md", "reruns.md"}  # they tell of commands that are gone
README = CHECKOUT / "README.md"
LATER = ("--text", "--filters", "--diversity")  # need a run with search: tests/system/search


def blocks(page: Path, language: str = "") -> list[str]:
    """Fenced blocks of a page in ``language`` ("": plain ones)."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """Words of each line of a plain or shell block that calls ``program``, continued lines joined, comments cut."""
    for block in (b for language in ("", "sh", "bash", "shell") for b in blocks(page, language)):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"^(\$ )?(\.venv/bin/)?", "", line.strip())
            if words.split(" ")[0] == program:
                yield shlex.split(words, comments=True)


def all_commands(program: str) -> list[tuple[str, list[str]]]:
    pages = [p for p in PAGES if p.name not in HISTORY_PAGES]
    return [(page.name, words) for page in pages for words in commands(page, program)]


@pytest.fixture(scope="module")
def user(root) -> str:
    return recorded(root)[contract.USER][0]


def with_values_of(text: str, server, user: str) -> str:
    """``text`` with the small shop's addresses and user in place of the page's."""
    text = text.replace("127.0.0.1:8001", f"{server.host}:{server.grpc_port}")
    text = text.replace("127.0.0.1:8000", f"{server.host}:{server.http_port}")
    return re.sub(r"user-\d{5}|USER_ID(?=\"[,\])])(?!\",\"datatype)", user, text)


def test_every_make_target_exists():
    makefile = (CHECKOUT / "Makefile").read_text()
    targets = {words[1] for _, words in all_commands("make")}
    assert {"demo", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets), targets


def test_every_command_takes_the_options_it_is_shown_with():
    from typer.main import get_command

    from vivace.cli.main import app

    shown = all_commands("vivace")
    assert shown
    for page, words in shown:
        command, rest = get_command(app), words[1:]
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, f"{page}: {' '.join(words)}"
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        given = {word.partition("=")[0].strip("[]") for word in rest if word.startswith(("--", "[--"))}
        assert given <= known, f"{page}: {' '.join(words)}: no {given - known}"


def test_the_queries_are_answered(root, served, features, user):
    server, _ = served
    titles = set(features.items()[contract.TITLE].str[:12])
    queries = [(page, words) for page, words in all_commands("vivace") if words[1] == "query" and words[2:]]
    run = [(page, words) for page, words in queries if not set(words) & set(LATER)]
    assert run
    for page, words in run:
        given = [*words[1:], "--name", root.name, "--artifacts", str(root.parent)]
        for option, value in (("--user", user), ("--url", f"{server.host}:{server.grpc_port}")):
            given = [*given, option, value]  # the last one given counts
        out = vivace(*given)
        assert out.returncode == 0 and "STATUS ok" in out.stdout, f"{page}: {' '.join(words)}: {out.stdout}{out.stderr}"
        assert sum(title in out.stdout for title in titles) >= 3, out.stdout


def test_the_client_call_of_the_readme_answers(served, user, features):
    server, _ = served
    (code, *_) = [b for b in blocks(README, "python") if "VivaceClient" in b]
    code = with_values_of(code, server, user) + "\nprint(answer.status, *answer.items)\n"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT)
    assert out.returncode == 0, out.stderr
    status, *items = out.stdout.splitlines()[-1].split()
    assert status == contract.STATUS_OK and items and set(items) <= set(features.items()[contract.ITEM])


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl (apt-get install curl)")
def test_the_curl_line_of_the_readme_answers(served, user, features):
    server, _ = served
    calls = re.findall(r"^curl .*?'$", README.read_text(), re.M | re.S)
    assert calls
    for call in calls:
        out = subprocess.run(shlex.split(with_values_of(call, server, user)), capture_output=True, text=True)
        outputs = {o["name"]: o["data"] for o in json.loads(out.stdout)["outputs"]}
        assert outputs[contract.STATUS.name] == [contract.STATUS_OK], outputs
        assert outputs[contract.ITEM_ID.name] and set(outputs[contract.ITEM_ID.name]) <= set(
            features.items()[contract.ITEM]
        )
