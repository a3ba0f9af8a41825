"""The page of a tuning run: what was chosen, what it gained, what each knob was worth, what came second."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from loadtest.reports.html import drawn, image, page, table
from loadtest.tune.decision import quality_sentence

SHOWN = ("engine", "history", "ranked", "layout", "instances", "threads", "batch", "preferred", "delay_us")


def pareto(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials that no other beats in both rate and quality, by rate."""
    out: list[dict[str, Any]] = []
    for row in sorted((r for r in rows if r["qps"]), key=lambda r: (-r["qps"], -r["quality"])):
        if not out or row["quality"] > out[-1]["quality"]:
            out.append(row)
    return out


def shown(value: Any) -> Any:
    return "whole model" if value == "" else value


def picture(decision: dict[str, Any]) -> bytes:
    rows, worth = [r for r in decision["trials"] if r["qps"]], decision.get("worth", {})
    ms = decision["objective"]["ms"]

    def draw(plt: Any) -> Any:
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
        dots = left.scatter(
            [r["qps"] for r in rows], [r["quality"] for r in rows], c=[r["p99"] or ms for r in rows], cmap="viridis"
        )
        front = pareto(rows)
        left.step([r["qps"] for r in front], [r["quality"] for r in front], where="post", color="grey", zorder=0)
        best = decision["chosen"]
        left.scatter([best["qps"]], [best["quality"]], s=180, facecolors="none", edgecolors="red", label="chosen")
        left.axhline(decision["objective"]["quality"], color="grey", linestyle="--")
        left.set_xlabel("requests a second within the objective")
        left.set_ylabel("NDCG@10 on validation, share of the whole model's")
        left.legend()
        left.grid(True, alpha=0.3)
        figure.colorbar(dots, ax=left, label="p99 ms at that rate")
        names = [f"{k}: {shown(v['value'])} (was {shown(v['untuned'])})" for k, v in worth.items()]
        right.barh(names, [best["qps"] - v["qps"] for v in worth.values()])
        right.set_xlabel("requests a second lost with the knob as it was untuned")
        right.grid(True, alpha=0.3)
        return figure

    return drawn(draw)


def reasons(decision: dict[str, Any]) -> list[str]:
    """Why this profile, in sentences that its figures bear out."""
    chosen, o = decision["chosen"], decision["objective"]
    trial, times = chosen["trial"], {int(k): v for k, v in decision["service_ms"].items()}
    size = max(b for b in times if b <= max(trial["batch"], 1))
    taken = times[size] + decision["overhead_ms"] * size
    sentences = [
        f"A batch of {size} takes {taken:.1f} ms of one core, graphs and server; of {o['ms']:g} ms that leaves "
        f"{max(0.0, o['ms'] - taken):.1f} ms to wait."
    ]
    sentences += [
        f"A larger batch, {b}, would take {times[b] + decision['overhead_ms'] * b:.1f} ms: "
        + ("too long for the objective." if times[b] + decision["overhead_ms"] * b > o["ms"] else "it still fits.")
        for b in sorted(times)
        if b > trial["batch"]
    ][:1]
    worth = sorted(decision.get("worth", {}).items(), key=lambda kv: kv[1]["qps"])
    for knob, value in worth[:3]:
        if value["qps"]:
            sentences.append(
                f"{knob}: {shown(value['value'])} for {shown(value['untuned'])} is worth "
                f"{chosen['qps'] / value['qps']:.2f} times the requests."
            )
        else:
            sentences.append(f"{knob}: with {shown(value['untuned'])} the objective is not met at any rate tried.")
    return sentences


def write(decision: dict[str, Any], path: Path, data: str) -> None:
    chosen, start, o = decision["chosen"], decision["untuned"], decision["objective"]
    rows = [
        [*(shown(r["trial"][k]) for k in SHOWN), f"{r['qps']:.0f}",
         f"{r['p50']:.1f}" if r["p50"] else "", f"{r['p99']:.1f}" if r["p99"] else "",
         f"{r['quality']:.1%} ({r['interval'][0]:.1%} to {r['interval'][1]:.1%})", r["runs"]]
        for r in decision["trials"]
    ]  # fmt: skip
    second = decision["runner_up"]
    gain = f", {chosen['qps'] / start:.2f} times the untuned {start:.0f}" if start else ""
    head = (
        f"<p>Objective: p{o['percentile']:g} within {o['ms']:g} ms, NDCG@10 at least {o['quality']:.1%} of the whole "
        "model's on either half of the validation requests. <b>"
        f"{chosen['qps']:.0f} requests a second</b>{gain}. {decision['configurations_run']} of "
        f"{decision['configurations']} configurations were run.</p>"
    )
    judged = (
        f"<p>{escape(quality_sentence(decision))}. Quality is judged on validation requests alone; the test requests "
        "make the load, and their targets were not read.</p>"
    )
    parts = [head, judged, "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in reasons(decision)) + "</ul>"]
    if second:
        parts.append(f"<p>Runner-up: {second['qps']:.0f} requests a second, {escape(str(second['trial']))}.</p>")
    parts.append(image(picture(decision), "quality over rate; worth of each knob"))
    header = [*SHOWN, "requests a second", "p50 ms", "p99 ms", "quality (95 % interval)", "runs"]
    parts.append("<h2>What was run</h2><p>0 requests a second: it did not reach the best of its time.</p>")
    parts.append(table(header, rows))
    path.write_text(page(f"Tuning of {data}", parts), encoding="utf-8")
