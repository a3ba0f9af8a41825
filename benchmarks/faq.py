"""Question answering over frequent questions: the search branch as it is, on another text. No training.

    python -m benchmarks.faq docs/faq/shop.csv [--ask "when will it arrive"]

A line of the file is question|answer|how somebody asks for it. Words (BM25), meaning (a pretrained sentence encoder)
and both by rank fusion, as ``query_search`` finds them: the share of the asked questions whose entry is first, and
among the first three, with 95 % bootstrap intervals. ``--ask`` answers by meaning, which finds the most here. The
last line of stdout is one JSON object.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from loadtest.reports.record import record_line
from search.data import Catalogue, Judgments
from search.hybrid import Candidates
from search.lexical import Field
from training.metrics import bootstrap
from training.search.evaluate import SearchConfig, TowerStudy
from training.text.tower import MINILM
from vivace.cli.options import console

COLUMNS = ("question", "answer", "asked")
CUTS = (1, 3)


def read(file: Path) -> list[dict[str, str]]:
    """Entries of the file. Raises ValueError for other columns, or a line with an empty one."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="|"))
    for number, row in enumerate(rows, 2):
        if set(row) != set(COLUMNS) or not all(row.values()):
            raise ValueError(f"{file}, line {number}: expected {'|'.join(COLUMNS)}, got {row}")
    return rows


def study_of(rows: list[dict[str, str]], folder: Path, encoder: str) -> TowerStudy:
    """Entries as items: the question is the title, the answer the text."""
    items = [str(number) for number in range(len(rows))]
    catalogue = Catalogue(items, {"title": [r["question"] for r in rows], "text": [r["answer"] for r in rows]})
    config = SearchConfig(fields=(Field("title", 3.0), Field("text", 1.0)), tower=encoder)
    judged = Judgments([row["asked"] for row in rows], [{item: 1.0} for item in items])
    return TowerStudy(catalogue, judged, config, folder, 7, lambda _: None, folder / "cache")


def places(found: list[Candidates]) -> np.ndarray:
    """Place from 0 of the entry that each question is of, float64; infinite where it was not found."""
    at = [np.flatnonzero(candidates.rows == number) for number, candidates in enumerate(found)]
    return np.array([float(place[0]) if len(place) else np.inf for place in at])


def main(
    file: Annotated[Path, typer.Argument(help="question|answer|asked, with that header", exists=True, dir_okay=False)],
    ask: Annotated[str, typer.Option(help="print the three best answers to this question alone")] = "",
    encoder: Annotated[
        str, typer.Option(help="minilm, or a folder or Hugging Face name of a sentence encoder")
    ] = MINILM,
) -> None:
    rows = read(file)
    with tempfile.TemporaryDirectory() as folder:
        study = study_of(rows, Path(folder), encoder)
        answered = study.answer([ask] if ask else [row["asked"] for row in rows])
    if ask:
        for row in answered.meaning[0].rows[:3]:
            console.print(f"{rows[row]['question']} {rows[row]['answer']}")
        return
    figures = {}
    for branch in ("words", "meaning", "hybrid"):
        place = places(getattr(answered, branch))
        hits = {k: (place < k).astype(float) for k in CUTS}
        figures[branch] = {f"hit@{k}": (round(float(h.mean()), 3), *bootstrap(h)) for k, h in hits.items()}
        console.print(
            f"{branch}: " + ", ".join(f"{n} {v:.3f} ({a:.3f} to {b:.3f})" for n, (v, a, b) in figures[branch].items())
        )
    print(record_line("faq", entries=len(rows), encoder=encoder, rows=figures))


if __name__ == "__main__":
    typer.run(main)
