"""README and docs: what they name exists, and they can be read in a terminal."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest
import typer

from vivace.cli.main import app

CHECKOUT = Path(__file__).resolve().parents[3]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
PRESENT = [p for p in PAGES if p.name not in ("log.md", "reruns.md")]  # those two may name what is gone
FOLDERS = "benchmarks|deploy|docs|loadtest|model_repository|preprocessing|search|serving|tests|training|vivace"
page = pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
present = pytest.mark.parametrize("path", PRESENT, ids=lambda p: p.name)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def commands(text: str) -> list[list[str]]:
    """Words of each ``vivace …`` in code, in a block or within a line."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)
    lines = [line.split(" #")[0].split("   ")[0] for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    parts = [part.strip() for line in [*lines, *inline] for part in line.replace("\n", " ").split(";")]
    return [part.split() for part in parts if re.match(r"(\.venv/bin/)?vivace [a-z]", part)]


def options(words: list[str]) -> set[str]:
    return {o for word in words for o in re.findall(r"^\[?(--[a-z][a-z-]*)", word)}


@page
def test_no_line_is_longer_than_120(path):
    long = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert not long, f"{path.name}: lines {long}"


@page
def test_links_lead_to_pages_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(other.read_text()), f"{path.name}: {target}"


@present
def test_files_and_modules_that_are_named_exist(path):
    text = path.read_text()
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text):
        assert list(CHECKOUT.glob(name.rstrip("/"))) or list(CHECKOUT.glob(f"{name}.py")), f"{path.name}: {name}"
    for module in re.findall(rf"((?:{FOLDERS})(?:\.\w+)+)", " ".join(re.findall(r"-m ([\w.]+)", text))):
        file = CHECKOUT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), f"{path.name}: -m {module}"


@present
def test_commands_and_options_exist(path):
    known = typer.main.get_command(app)
    for words in commands(path.read_text()):
        command, rest = known, words[1:]
        while isinstance(command, click.Group) or hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, f"{path.name}: {' '.join(words)}"
            command, rest = command.commands[rest[0]], rest[1:]
        names = {o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)}
        unknown = options(rest) - names - {"--help"}
        assert not unknown, f"{path.name}: {' '.join(words)}: no {unknown}"


def test_the_readme_is_for_someone_who_knows_no_history():
    text = (CHECKOUT / "README.md").read_text()
    assert len(text.splitlines()) <= 220
    assert "<!--" not in text and not re.search(r"\basked\b", text)
    hashes = [w for w in re.findall(r"\b[0-9a-f]{7,12}\b", text) if re.search("[a-f]", w) and re.search("[0-9]", w)]
    assert not hashes, hashes


def test_the_readme_shows_every_folder():
    tree = re.search(r"## Tree\n```\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.S)
    shown = set(re.findall(r"^(\w+)/", tree.group(1), re.M))
    files = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    folders = {f.split("/")[0] for f in files.splitlines() if "/" in f and not f.startswith(".")}
    assert shown == folders
