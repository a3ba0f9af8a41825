"""The GPU part of docs/results.md, rendered from the records of ``make gpu``.

    python -m benchmarks.gpu.table docs/benchmarks/gpu-*.json

It writes what stands between two marks of the page, record by record; a test compares page and records.
"""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu.kernels import kind
from benchmarks.gpu.run import BESIDE
from vivace.manifest import CHECKOUT

PAGE = CHECKOUT / "docs" / "results.md"
WIDTH = 118  # of a line of the page
BEGIN, END = "<!-- rendered by benchmarks.gpu.table: begin -->", "<!-- rendered by benchmarks.gpu.table: end -->"
METHODS = (("retrieval", "retrieval"), ("retrieval + ranking", "ranked"))
GRID = ((200, 500, 1), (200, 500, 64), (200, 500, 1024), (1000, 500, 64), (4096, 500, 16), (200, 2000, 64))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, and an empty one."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def trainings(step: dict[str, Any]) -> list[str]:
    def row(r: dict[str, Any]) -> list[str]:
        sizes = r.get("parameters", {})
        total = f"{sizes['layers'] / 1e6:.1f} + {sizes['items'] / 1e6:.1f} M" if sizes else "-"
        figures = [
            f"{r[f'{m} NDCG@10']:.4f} / {r[f'{m} HR@10']:.4f}" if f"{m} NDCG@10" in r else "-" for m, _ in METHODS
        ]
        how = {"ended with 0": "", "ended with 1": ", failed"}.get(r["ending"], ", cut off")
        changed = ", ".join(f"{k} {v}" for k, v in r.get("changes", {}).items())
        return [
            f"`{r['label']}`" + (f" ({changed})" if changed else ""), total, f"{r['epochs']}{how}", *figures,
            f"{r['retrieval_s']:.0f} s" if "retrieval_s" in r else "-",
        ]  # fmt: skip

    header = [
        "preset and seed",
        "layers + items",
        "epochs",
        "retrieval NDCG@10 / HR@10",
        "ranked",
        "retriever trained in",
    ]
    return markdown(header, map(row, sorted(step["rows"], key=lambda r: str(r["label"]))))


def _relative(r: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Speed against bf16 compiled, of the same form and batch."""
    key = ("preset", "stage", "form", "batch")  # whatever the lookup
    for other in rows:
        if (other["engine"], other["format"]) == ("compile", "bf16") and all(other[k] == r[k] for k in key):
            return f"{other['ms'] / r['ms']:.2f}"
    return "-"


def engines(step: dict[str, Any]) -> list[str]:
    rows = step["rows"]
    best = {name: batch for name, batch in step["best_batch"].items()}
    chosen = [r for r in rows if r["batch"] == best.get(f"{r['preset']} {r['stage']}")]
    order = {"large ranker": 0, "base ranker": 1, "large retriever": 2, "base retriever": 3}
    chosen.sort(key=lambda r: (order.get(f"{r['preset']} {r['stage']}", 9), r["ms"]))
    return markdown(
        ["graph (batch)", "engine", "format", "form", "ms", "requests/s", "TFLOP/s", "of bf16 here", "of data sheet",
         "x bf16", "top 10"],
        ([f"`{r['preset']}` {r['stage']} ({r['batch']})", r["engine"], r["format"],
          ", ".join(filter(None, (r["form"], r["lookup"]))), f"{r['ms']:.2f}",
          f"{r['requests_per_s']:,.0f}", f"{r['tflops']:.0f}", f"{r['share_bf16']:.1%}", f"{r['share_data_sheet']:.1%}",
          _relative(r, rows), f"{r['same_top10']:.1%}"] for r in chosen),
    )  # fmt: skip


def formats(step: dict[str, Any]) -> list[str]:
    rows = [r for r in step["rows"] if r["part"] == "test" and r["format"] != "fp32"]
    return markdown(
        ["run", "in this format", "format", "NDCG@10, test", "of float32", "difference, 95 %"],
        ([f"`{r['run']}`", r["stage"], r["format"], f"{r['ndcg10']:.4f}", f"{r['share_of_fp32']:.2%}",
          f"{r['difference'][0]:+.4f} to {r['difference'][1]:+.4f}"] for r in rows),
    )  # fmt: skip


def grid(step: dict[str, Any]) -> list[str]:
    rows = [r for r in step["rows"] if (r["history"], r["candidates"], r["batch"]) in GRID]
    rows.sort(key=lambda r: (r["stage"], GRID.index((r["history"], r["candidates"], r["batch"])), r["gflop"]))
    return markdown(
        ["stage", "history", "candidates", "batch", "preset", "ms", "requests/s", "candidates/s", "of the product"],
        ([r["stage"], f"{r['history']:,}", f"{r['candidates']:,}", f"{r['batch']:,}", f"`{r['preset']}`",
          f"{r['ms']:.2f}",
          f"{r['requests_per_s']:,.0f}",
          f"{r['candidates_per_s'] / 1e6:.1f} M" if r["stage"] == "ranker" else "",
          f"{r['share_bf16']:.1%}"] for r in rows),
    )  # fmt: skip


def train_speed(step: dict[str, Any]) -> list[str]:
    return markdown(
        ["retriever", "how", "windows a step", "ms a step", "events/s", "TFLOP/s", "of the bf16 product"],
        ([f"`{r['preset']}`", r["how"], str(r["batch"]), f"{r['ms']:.1f}", f"{r['tokens_per_s'] / 1e6:.2f} M",
          f"{r['tflops']:.0f}", f"{r['share']:.1%}"] for r in step["rows"]),
    )  # fmt: skip


def kernels(step: dict[str, Any]) -> list[str]:
    """Of the longest kernels, which are nearly all of the time, by kind."""
    rows = []
    for name, longest in step["largest"].items():
        by_kind: dict[str, float] = defaultdict(float)
        for kernel, us in longest:
            by_kind[kind(kernel)] += us
        total = sum(by_kind.values())
        parts = sorted(by_kind.items(), key=lambda pair: -pair[1])
        rows.append([f"`{name}`", f"{total / 1000:.2f}", ", ".join(f"{k} {us / total:.0%}" for k, us in parts)])
    return markdown(["ranker, compiled, 1,024 requests", "ms of the twelve longest kernels", "share"], rows)


def served(step: dict[str, Any]) -> list[str]:
    """By profile: one request after the other, and the largest rate that was met."""
    rows = []
    for alone in (r for r in step["rows"] if "graphs_ms" in r):
        profile = alone["profile"]
        knee = step.get(f"knee_{profile}_qps", 0.0)
        at_knee = [r for r in step["rows"] if r["profile"] == profile and "in_time" in r and r["in_time"] >= 0.99]
        best = max(at_knee, key=lambda r: float(r["offered"]), default=None)
        rows.append([
            f"`{profile}`", f"{alone['p50_ms']:.2f}", f"{alone['graphs_ms']:.2f}", f"{alone['overhead_ms']:.2f}",
            f"{knee:,.0f}", f"{best['p50_ms']:.1f} / {best['p99_ms']:.1f}" if best else "-",
            f"{best['processor_ms']:.2f}" if best else "-", f"{best['gpu_busy']:.0%}" if best and "gpu_busy" in best
            else "-", "yes" if alone["beside_compiler"] else "no",
        ])  # fmt: skip
    if not rows:  # records of before there was such a row
        return []
    return markdown(
        ["profile", "p50 of one request, ms", "its graphs alone", "what the server adds",
         f"requests/s within {step['slo_ms']:.0f} ms", "p50 / p99 there, ms", "processor ms a request", "GPU busy",
         "beside a compiler"], rows,
    )  # fmt: skip


def state_reuse(step: dict[str, Any]) -> list[str]:
    return markdown(
        ["encoder", "events", "batch", "anew, ms", "newest event alone", "ratio", "with states from host memory",
         "ratio", "KiB a user"],
        ([f"`{r['preset']}` {r['family']}", f"{r['history']:,}", str(r["batch"]), f"{r['anew_ms']:.3f}",
          f"{r['step_ms']:.3f}", f"{r['ratio']:.1f}", f"{r['step_host_ms']:.3f}", f"{r['ratio_host']:.1f}",
          f"{r['kib_a_user']:,.0f}"] for r in step["rows"]),
    )  # fmt: skip


def long_history(step: dict[str, Any]) -> list[str]:
    return markdown(
        ["part", "learned bias", "events", "batch", "ms", "events/s", "memory, GiB"],
        ([r["part"], r["bias"], f"{r['history']:,}", str(r["batch"]), f"{r['ms']:.2f}",
          f"{r['events_per_s'] / 1e6:.2f} M", f"{r['memory_mib'] / 1024:.1f}"]
         for r in sorted(step["rows"], key=lambda r: (r["part"], r["bias"], r["history"], r["batch"]))),
    )  # fmt: skip


def packages(step: dict[str, Any]) -> list[str]:
    return markdown(
        ["graph", "exported in s", "compiled in s", "outcome"],
        ([r["graph"], f"{r['export_s']:.1f}", f"{r['compile_s']:.1f}", r["outcome"]] for r in step["rows"]),
    )


def not_run(steps: dict[str, Any]) -> list[str]:
    lines = []
    for name, step in steps.items():
        reasons = {what: why for what, why in step.get("not_run", {}).items() if why != "no time left"}
        lines += [f"- {name}: {what}: {why}" for what, why in reasons.items()]
        if (late := len(step.get("not_run", {})) - len(reasons)) > 0:
            lines.append(f"- {name}: {late} further combinations: no time left")
        if step["outcome"] != "ok" and not step["outcome"].startswith(BESIDE):
            lines.append(f"- {name}: {step['outcome']}")
    return ["Not run, or not to its end:", "", *lines, ""] if lines else []


RENDERED = (
    ("served", "Served by Triton", served),
    ("state_reuse", "Newest event alone, beside encoding the history anew; TF32, one CUDA graph", state_reuse),
    ("long_history", "Long histories, retriever of `base`, bf16", long_history),
    ("packages", "AOTInductor's compiler, beside the trainings", packages),
    ("train", "Trainings side by side on the card", trainings),
    ("engines", "Graphs by engine and number format", engines),
    ("format_quality", "What a number format costs in quality", formats),
    ("grid", "Latency by size, bf16, one CUDA graph, nothing compiled", grid),
    ("kernels", "Where the ranker's time goes", kernels),
    ("train_speed", "Training steps alone on the card, bf16", train_speed),
)  # fmt: skip


def render(record: dict[str, Any], source: str) -> str:
    """The page's part in Markdown."""
    steps = record["steps"]
    machine = steps.get("machine", {})
    peaks = machine.get("peaks", {})
    measured = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in peaks.items() if name != "copy")
    known: dict[str, Any] = machine or next(iter(steps.values()), {})
    lines = [
        f"{known.get('device', record['gpu'] or 'no GPU')}, {record['cores']} cores, {record['date']}, commit "
        f"{record['commit']}, torch {known.get('torch', record['versions'].get('torch', '?'))}; `{source}`."
        + (
            f" Measured in the same run: TFLOP/s of an 8192³ product {measured}; copy {peaks['copy'] / 1e12:.1f} TB/s."
            if peaks else ""
        ),
        "",
    ]  # fmt: skip
    for name, title, part in RENDERED:
        if steps.get(name, {}).get("rows") and (table := part(steps[name])):
            lines += [f"**{title}.**", "", *table]
    lines += not_run(steps)
    wrapped = (
        x
        if x.startswith("|")
        else textwrap.fill(
            x, WIDTH, break_on_hyphens=False, break_long_words=False, subsequent_indent="  " * x.startswith("- ")
        )
        for x in lines
    )
    return "\n".join(wrapped).rstrip() + "\n"


def between(page: str, text: str) -> str:
    """``page`` with ``text`` between the marks. Raises ValueError where a mark is missing."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"{PAGE}: expected the lines {BEGIN!r} and {END!r}, found none")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}"


def main(records: Annotated[list[Path], typer.Argument(help="what make gpu wrote")]) -> None:
    PAGE.write_text(between(PAGE.read_text(), "\n".join(render(json.loads(r.read_text()), named(r)) for r in records)))


def named(record: Path) -> str:
    path = record.resolve()
    return str(path.relative_to(CHECKOUT)) if path.is_relative_to(CHECKOUT) else record.name


if __name__ == "__main__":
    typer.run(main)
