"""Self-contained report pages: text, tables and pictures in one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from datetime import date
from html import escape
from io import BytesIO
from typing import Any

from vivace.machine import cpu
from vivace.manifest import commit

STYLE = """body{font:15px sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse;margin:1em 0}
td,th{border:1px solid #bbb;padding:.3em .7em;text-align:left}img{max-width:100%}"""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def drawn(draw: Callable[[Any], Any]) -> bytes:
    """PNG of what ``draw(pyplot)`` draws and returns as a figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, buffer = draw(pyplot), BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def image(png: bytes, what: str) -> str:
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def page(title: str, parts: Sequence[str]) -> str:
    """The page: its title, where and when it was made, then ``parts`` of HTML."""
    made = f"<p>{date.today()}, commit {escape(commit())}, {escape(cpu()[0])}.</p>"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"{head}\n<h1>{escape(title)}</h1>{made}\n" + "\n".join(parts) + "\n</html>\n"
