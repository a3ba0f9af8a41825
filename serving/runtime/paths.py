"""Paths of a version's catalogue beside the reasons of an explanation: what joins a recommended item to an item that
its score was computed to hang on. They are read off the attributes that the version was compiled with, and off the rows
that were put in live since. No torch, no NVTabular.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from serving.runtime import item_graph
from serving.runtime.item_graph import ItemGraph, Triple, of_catalogue
from serving.runtime.response import ResponseStage
from serving.runtime.ruled import ATTRIBUTES, SCHEMA
from serving.runtime.why import Because
from vivace.contract import FIRST_ID, DataSchema
from vivace.explain_contract import HISTORY


def hangs_on(of: Because) -> list[str]:
    """Items of the history that an item's score falls without, the largest effect last."""
    reasons = [reason for reason in of.reasons if reason.part.kind == HISTORY and reason.drop > 0]
    return [reason.part.name for reason in reversed(reasons)]


class Paths:
    """Of the items of one version. ``folder``: of its response."""

    def __init__(self, folder: Path, respond: ResponseStage) -> None:
        """Raises FileNotFoundError for a version that was compiled without the attributes of its items."""
        import pyarrow.parquet as pq

        schema = DataSchema.from_json(json.loads((folder / SCHEMA).read_text(encoding="utf-8")))
        self.relations = (*schema.item_categoricals, *schema.item_lists)
        table = pq.read_table(folder / ATTRIBUTES, columns=list(self.relations))
        self._respond, self._number = respond, -1
        self._changed: dict[str, Mapping[str, Any] | None] = {}
        names = [name.decode() for name in respond.names[FIRST_ID:].tolist()]
        self._compiled = {name: table[name].to_pylist() for name in self.relations}
        self._row = {name: row for row, name in enumerate(names)}
        self._graph = ItemGraph(of_catalogue(names, self._compiled))

    @classmethod
    def of(cls, folder: Path, respond: ResponseStage) -> Paths | None:
        """None for a version without attributes: an older one, or of a catalogue that relates no items."""
        if not (folder / ATTRIBUTES).exists():
            return None
        paths = cls(folder, respond)
        return paths if paths.relations else None

    def __call__(self, of: Because) -> item_graph.Path | None:
        """What joins an item to one that it hangs on; None where nothing does, or a business rule put it there."""
        self._follow()
        return None if of.ruled else self._graph.path(hangs_on(of), of.item)

    def _follow(self) -> None:
        """Takes in what changed of the catalogue."""
        catalogue = self._respond.catalogue
        if catalogue is None or catalogue.number == self._number:
            return
        self._number = catalogue.number
        rows: dict[str, Mapping[str, Any] | None] = dict(catalogue.rows)
        for item in self._changed.keys() | rows.keys():
            if item not in rows:  # it is as it was compiled
                self._graph.put(item, self._of_compiled(item))
            elif item not in self._changed or self._changed[item] is not rows[item]:
                self._graph.put(item, self._of_row(item, rows[item] or {}))
        self._changed = rows

    def _of_compiled(self, item: str) -> Iterable[Triple]:
        row = self._row.get(item)
        columns = {} if row is None else {name: values[row : row + 1] for name, values in self._compiled.items()}
        return of_catalogue([item], columns)

    def _of_row(self, item: str, row: Mapping[str, Any]) -> Iterable[Triple]:
        return of_catalogue([item], {name: [row.get(name)] for name in self.relations})
