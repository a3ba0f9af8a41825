"""Which lexical engine: ours on bm25s (sparse matrices) beside tantivy (inverted lists in Rust), on one catalogue.

    pip install tantivy==0.27.0     # for this comparison alone
    python -m benchmarks.lexical_engines --hm /folder/of/hm --esci /folder/of/esci

Speed on H&M's 105,542 articles with queries made of their own names and attributes, one thread, taking turns; quality
(NDCG@10) on ESCI's judged queries with the same terms and boosts. Ours scores every item, as filters and the ranker
want it; tantivy finds the first 200. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.turns import in_turns
from loadtest.reports.record import record_line
from search.data import Catalogue, read_esci
from search.hybrid import top
from search.lexical import Field, Lexical
from search.text import terms
from training.search.evaluate import CANDIDATES, ndcg
from vivace.machine import cpu

console = Console(width=120)
HM_TEXTS = {
    "title": ["prod_name", "product_type_name"], "attributes": ["colour_group_name", "graphical_appearance_name",
    "index_name", "section_name", "garment_group_name"], "description": ["detail_desc"],
}  # fmt: skip
HM_FIELDS = [Field("title", 3.0), Field("attributes", 1.0), Field("description", 0.5)]
ESCI_FIELDS = [Field("title", 3.0), Field("bullets", 0.5), Field("description", 0.3), Field("brand", 0.5)]
Ask = Callable[[list[str]], Sequence[int]]


def read_hm(folder: Path) -> Catalogue:
    """H&M's articles (non-commercial use)."""
    frame = pd.read_parquet(folder / "articles.parquet").fillna("")
    texts = {name: frame[columns].astype(str).agg(" ".join, axis=1).tolist() for name, columns in HM_TEXTS.items()}
    return Catalogue(frame["article_id"].astype(str).tolist(), texts)


def made_queries(folder: Path, count: int, seed: int) -> list[str]:
    """Colour and kind of random articles, as a shopper would name them."""
    frame = pd.read_parquet(folder / "articles.parquet").sample(count, random_state=seed)
    pairs = zip(frame["colour_group_name"], frame["product_type_name"], strict=True)
    return [f"{colour} {kind}".lower() for colour, kind in pairs]


def ours(catalogue: Catalogue, fields: Sequence[Field]) -> tuple[Ask, float]:
    index = Lexical.build(catalogue.texts, fields)

    def ask(query: list[str]) -> Sequence[int]:
        scores = index(query)
        scores[scores <= 0] = -np.inf
        return top(scores, CANDIDATES).tolist()

    return ask, index.bytes / 2**20


def tantivy(catalogue: Catalogue, fields: Sequence[Field]) -> tuple[Ask, float | None]:
    """Indexed by our own terms, so that both see the same words."""
    import tantivy as t

    builder = t.SchemaBuilder()
    for f in fields:
        builder.add_text_field(f.name, tokenizer_name="whitespace")
    builder.add_integer_field("row", stored=True)
    schema = builder.build()
    index = t.Index(schema)
    writer = index.writer(heap_size=200_000_000, num_threads=1)
    for row in range(len(catalogue.items)):
        texts = {f.name: " ".join(terms(catalogue.texts[f.name][row])) for f in fields}
        writer.add_document(t.Document(row=row, **texts))
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher = index.searcher()

    def ask(query: list[str]) -> Sequence[int]:
        parts = [
            (t.Occur.Should, t.Query.boost_query(t.Query.term_query(schema, f.name, term), f.boost))
            for f in fields
            for term in query
        ]
        hits = searcher.search(t.Query.boolean_query(parts), limit=CANDIDATES, order_by_field=None).hits
        return [searcher.doc(address)["row"][0] for _, address in hits]

    return ask, None  # it keeps the index in memory and does not say how large it is


ENGINES: dict[str, Callable[[Catalogue, Sequence[Field]], tuple[Ask, float | None]]] = {
    "ours, bm25s": ours,
    "tantivy": tantivy,
}


def speed(catalogue: Catalogue, queries: Sequence[list[str]], rounds: int) -> dict[str, dict[str, Any]]:
    """Build time, size and ms of a query by engine; the engines take turns."""
    record: dict[str, dict[str, Any]] = {}
    asks, times = dict[str, Ask](), dict[str, list[float]]()
    for name, build in ENGINES.items():
        began = time.perf_counter()
        asks[name], mib = build(catalogue, HM_FIELDS)
        record[name] = {"build_s": round(time.perf_counter() - began, 1), "index_mib": mib and round(mib, 1)}
    for _, name in in_turns(rounds, list(asks)):
        for query in queries:
            began = time.perf_counter()
            asks[name](query)
            times.setdefault(name, []).append((time.perf_counter() - began) * 1000)
    for name, ms in times.items():
        record[name] |= {f"p{q}_ms": float(np.percentile(ms, q)) for q in (50, 99)}
    return record


def quality(esci: Path) -> dict[str, float]:
    """NDCG@10 of ESCI's judged queries by engine."""
    products, judgments = read_esci(esci)
    ndcg_by_engine = {}
    for name, build in ENGINES.items():
        ask, _ = build(products, ESCI_FIELDS)
        each = [
            ndcg([gains.get(products.items[row], 0.0) for row in ask(terms(query))[:10]], list(gains.values()))
            for query, gains in zip(judgments.queries, judgments.gains, strict=True)
        ]
        ndcg_by_engine[name] = float(np.mean(each))
    return ndcg_by_engine


def main(
    hm: Annotated[Path, typer.Option(help="folder of H&M")],
    esci: Annotated[Path, typer.Option(help="folder of ESCI")],
    queries: int = 500,
    rounds: int = 3,
    seed: int = 7,
) -> None:
    catalogue = read_hm(hm)
    record = speed(catalogue, [terms(q) for q in made_queries(hm, queries, seed)], rounds)
    table = Table(title=f"{len(catalogue.items):,} articles, {cpu()[0]}, one thread", title_justify="left")
    for column in ("", "build s", "index MiB", "p50 ms", "p99 ms", "NDCG@10, ESCI"):
        table.add_column(column, justify="right" if column else "left")
    for name, ndcg_10 in quality(esci).items():
        r = record[name]
        r["esci_ndcg@10"] = ndcg_10
        table.add_row(name, str(r["build_s"]), str(r["index_mib"]), *(f"{r[k]:.2f}" for k in ("p50_ms", "p99_ms")),
                      f"{ndcg_10:.4f}")  # fmt: skip
    console.print(table)
    print(record_line("lexical engines", engines=record))


if __name__ == "__main__":
    typer.run(main)
