"""What README.md and docs/*.md tell a reader to type: `make` targets exist, `vivace query` is answered.

Names and options are checked in tests/unit/docs, the README's client call and curl line in tests/system/docs.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from preprocessing.requests import recorded
from tests.support import vivace
from vivace import contract
from vivace.manifest import CHECKOUT

HISTORY_PAGES = {"log.md", "reruns.md"}  # they tell of commands that are gone
PAGES = [CHECKOUT / "README.md", *(p for p in sorted((CHECKOUT / "docs").glob("*.md")) if p.name not in HISTORY_PAGES)]
OF_SEARCH = {"--text", "--filters", "--diversity"}  # need a run with search: tests/system/search


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """Words of each command of ``program`` in code: a line of a block, continued lines joined, or within a sentence."""
    text = page.read_text().replace("\\\n", " ")
    fence = r"^```[a-z]*\n(.*?)^```"
    lines = [line for block in re.findall(fence, text, re.M | re.S) for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(fence, "", text, flags=re.M | re.S))
    for line in [*lines, *(part.replace("\n", " ") for part in inline)]:
        words = re.sub(r"^(\$ )?(\.venv/bin/)?", "", line.strip())
        if re.match(rf"{program} [a-z]", words):
            yield shlex.split(words, comments=True)


def test_every_make_target_exists():
    makefile = (CHECKOUT / "Makefile").read_text()
    targets = {words[1] for page in PAGES for words in commands(page, "make")}
    assert {"demo", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets), targets


def test_each_query_that_is_shown_is_answered_with_titles(root, served, features):
    server, _ = served
    titles = set(features.items()[contract.TITLE].str[:12])
    known = {
        "--user": recorded(root)[contract.USER][0], "--url": f"{server.host}:{server.grpc_port}", "--name": root.name,
        "--artifacts": str(root.parent),
    }  # fmt: skip
    shown = [words for page in PAGES for words in commands(page, "vivace") if words[1] == "query"]
    for words in [["vivace", "query"], *(w for w in shown if not set(w) & OF_SEARCH)]:
        out = vivace(*words[1:], *(word for pair in known.items() for word in pair))  # the last one given counts
        assert out.returncode == 0 and "STATUS ok" in out.stdout, f"{' '.join(words)}: {out.stdout}{out.stderr}"
        assert sum(title in out.stdout for title in titles) >= 3, out.stdout
