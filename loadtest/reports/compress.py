"""``vivace report compress``: what compression brought to a run and its variants, as one HTML page and a picture.

Quality is that of the compiled graphs on validation requests (the gate's figure; where a float32 engine was not judged,
that of the evaluated models). A variant is judged by held-out users alone, so compare its change, not its NDCG.
Speed is measured on the spot, all engines taking turns (``loadtest.reports.graph_speed``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.reports.graph_speed import Speed, measure
from loadtest.reports.html import image, page, table
from training.judge.gate import reference_ranks
from training.metrics import ndcg_of
from vivace.run import COMPILED, RETRIEVAL, Run

BATCHES = (1, 16)


@dataclass(frozen=True)
class Variant:
    """One compiled run: its NDCG@10 with the interval of its change against the whole model, and what it is made of."""

    name: str
    root: Path
    ndcg: float
    change: float
    interval: tuple[float, float]
    forced: bool
    precision: str
    parameters: int
    sensitivities: dict[str, dict[str, float]]
    targets: dict[str, dict[str, float]]


def variant(name: str, root: Path) -> Variant:
    run = Run(root)
    results = run.manifest(COMPILED)["results"]
    card = run.card()
    gate, evaluated = card["gate"], float(ndcg_of(reference_ranks(run)).mean())
    judged: dict[str, Any] = {"engine": evaluated, "change": 0.0, "interval": (0.0, 0.0)}
    judged |= gate if isinstance(gate, dict) else {}
    change, low, high = (float(x or 0.0) for x in (judged["change"], *judged["interval"]))  # None: unknown
    parameters = run.manifest(RETRIEVAL)["results"].get("parameters", 0)
    return Variant(
        name, root, judged["engine"], change, (low, high), bool(judged.get("forced")),
        card["precision"] if card["tables"] == "fp32" else f"{card['tables']} tables", parameters,
        results.get("sensitivities", {}), results.get("targets", {}),
    )  # fmt: skip


def variants(root: Path) -> list[Variant]:
    """The run itself, then every compiled variant under ``compressed``. Raises FileNotFoundError if it has none."""
    folders = sorted(f for f in Run(root).variants.glob("*") if Run(f).card_file.exists())
    if not folders:
        raise FileNotFoundError(
            f"{Run(root).variants}: expected compiled variants, got none; run 'vivace compress' first"
        )
    return [variant("whole model", root), *(variant(f.name, f) for f in folders)]


def picture(compared: list[Variant], speeds: list[Speed], path: Path) -> None:
    """Quality over latency by batch size, and the share of the top 10 that each quantized product leaves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    products = [
        (v.name, stage, product, share)
        for v in compared
        for stage, shares in v.sensitivities.items()
        for product, share in shares.items()
    ]
    figure, axes = plt.subplots(1, 2 + bool(products), figsize=(6 * (2 + bool(products)), 5), constrained_layout=True)
    for axis, batch in zip(axes, BATCHES, strict=False):
        for v in compared:
            speed = next(s for s in speeds if s.run == str(v.root) and s.batch == batch)
            low, high = (100 * abs(v.change - x) for x in v.interval)
            axis.errorbar(speed.ms, 100 * v.change, yerr=[[low], [high]], fmt="o", capsize=3)
            at = (speed.ms, 100 * v.change)
            axis.annotate(f"{v.name}, {v.precision}", at, xytext=(4, 6), textcoords="offset points")
        axis.set_xlabel(f"ms a batch of {batch}, one thread")
        axis.set_ylabel("change of NDCG@10 on validation requests, %")
        axis.margins(x=0.3, y=0.2)
        axis.grid(True, alpha=0.3)
    if products:
        products.sort(key=lambda p: p[3])
        axis, shown = axes[-1], products[:20]
        axis.barh([f"{v}: {s} {n[-40:]}" for v, s, n, _ in shown], [1 - p[3] for p in shown])
        axis.set_xlabel("share of the top 10 that changes if it alone is quantized")
        axis.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(root: Path, target: Path, seconds: float = 1.0, openvino: bool = True) -> list[Speed]:
    """Writes ``target``/compress.html and compress.png of ``artifacts/<name>``; returns the speeds measured."""
    compared = variants(root)
    speeds = measure([v.root for v in compared], BATCHES, 5, seconds, eager=True, openvino=openvino)
    target.mkdir(parents=True, exist_ok=True)
    png = target / "compress.png"
    picture(compared, speeds, png)
    quality = [
        [
            v.name, v.precision, f"{v.parameters:,}", f"{v.ndcg:.4f}",
            f"{v.change:+.2%} ({v.interval[0]:+.2%} to {v.interval[1]:+.2%})" if v.change or any(v.interval) else "",
            "forced" if v.forced else "",
            f"{next(s.bytes for s in speeds if s.run == str(v.root)) / 2**20:.1f}",
        ]
        for v in compared
    ]  # fmt: skip
    names = {str(v.root): v.name for v in compared}

    def label(run: str) -> str:
        kind, _, path = run.rpartition(" ")
        return f"{names[path]}, {kind or 'ONNX Runtime'}"

    times = [[label(s.run), s.batch, f"{s.ms:.2f}", f"{s.ratio:.2f}"] for s in speeds]
    products = [
        [v.name, stage, name, f"{share:.1%}"]
        for v in compared
        for stage, shares in v.sensitivities.items()
        for name, share in sorted(shares.items(), key=lambda x: x[1])
    ]
    targets = [
        [v.name, kind, key, f"{value:.4g}"]
        for v in compared
        for kind, values in v.targets.items()
        for key, value in values.items()
    ]
    header = ["variant", "engine", "retriever's parameters", "NDCG@10, validation", "change", "gate", "MiB"]
    parts = [
        image(png.read_bytes(), "quality over latency"),
        "<h2>Quality and size</h2>" + table(header, quality),
        "<h2>Times by target, both graphs, one thread</h2>",
        table(["engine", "batch", "ms", "times the whole model"], times),
    ]
    if products:
        parts.append("<h2>Sensitivity</h2><p>Share of the top 10 that stays if a product alone is quantized.</p>")
        parts.append(table(["variant", "stage", "product", "stays"], products))
    if targets:
        parts.append("<h2>Other targets</h2>" + table(["variant", "target", "what", "value"], targets))
    (target / "compress.html").write_text(page(f"Compression of {root.name}", parts), encoding="utf-8")
    return speeds
