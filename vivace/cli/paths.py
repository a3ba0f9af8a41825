"""What the catalogue says that a recommended item and its reasons have in common, for ``vivace why`` and the demo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.client import Explained
from vivace.client_explain import Explanation
from vivace.contract import ITEM, TITLE
from vivace.explain_contract import ENGLISH, HISTORY
from vivace.run import Run

if TYPE_CHECKING:
    import pandas as pd

    from serving.runtime.item_graph import ItemGraph


def graph_of(run: Run) -> tuple[ItemGraph, pd.DataFrame]:
    """(relations of the run's catalogue: categorical attributes and lists, titles by item id)."""
    import pyarrow.parquet as pq

    from preprocessing.features import CATALOGUE_FILE
    from serving.runtime.item_graph import ItemGraph, of_catalogue

    schema = run.schema()
    relations = [*schema.item_categoricals, *schema.item_lists]
    frame = pq.read_table(run.features / CATALOGUE_FILE, columns=[ITEM, TITLE, *relations]).to_pandas()
    graph = ItemGraph(of_catalogue(frame[ITEM].tolist(), {name: frame[name].tolist() for name in relations}))
    return graph, frame.set_index(ITEM)[TITLE]


def hangs_on(explanation: Explanation) -> list[str]:
    """Items of the history that an item's score falls without, the largest effect last."""
    reasons = [r for r in explanation.reasons if r["kind"] == HISTORY and (r["effect"] is None or r["effect"] > 0)]
    return [r["events"][0] for r in reversed(reasons)]


def in_common(run: Run, explained: Explained, language: str = ENGLISH) -> list[str]:
    """Of each item a sentence on what joins it to a reason in the catalogue, "" where nothing does."""
    graph, titles = graph_of(run)
    named = {item: title for item, title in titles.items() if title}
    paths = [graph.path(hangs_on(of), of.item) for of in explained.items]
    return [path.sentence(named, language) if path else "" for path in paths]
