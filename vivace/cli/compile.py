"""``vivace compile``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vivace.cli.options import (
    DEFAULT_ARTIFACTS,
    Artifacts,
    Bound,
    Force,
    Name,
    Precision,
    PresetName,
    Seed,
    Tables,
    chosen_preset,
    say,
)
from vivace.cli.runs import say_next, step
from vivace.cli.values import choice, one_of, values_of
from vivace.running import running

TARGETS = values_of("training.compile.targets:TARGETS")
INDEXES = values_of("training.compile.compiler:INDEXES")


def compile_(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    precision: Precision = "fp32",
    tables: Tables = "fp32",
    fold: Annotated[bool, typer.Option(help="what depends on an item alone becomes a table of the catalogue")] = True,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help=f"beside the CPU: {', '.join(TARGETS)}; may be repeated", parser=one_of(TARGETS), metavar="NAME"
        ),
    ] = None,
    index: Annotated[str, choice("--index", INDEXES, "candidates from a FAISS index (else exact)")] = "",
    shards: Annotated[int, typer.Option(help="servers that the items of retrieval are dealt to (0: none)", min=0)] = 0,
    bound: Bound = 0.01,
    force: Force = False,
) -> None:
    """Export to ONNX, check against PyTorch (int8: by the quality gate), publish a new version of the repository."""
    with step(name, artifacts) as run:
        from preprocessing.features import Features
        from serving.releases import refusals, releases, version_of
        from training.compile.compiler import CompileConfig, compile_models

        chosen: dict[str, Any] = {"precision": precision, "tables": tables, "index": index}  # each is one of its values
        targets: tuple[Any, ...] = tuple(target or ())
        config = CompileConfig(fold=fold, targets=targets, shards=shards, bound=bound, force=force, **chosen)
        sizes = chosen_preset(preset, run.root)
        results = compile_models(Features(run.features), sizes, run.root, seed, say, config)["results"]
    for stage, values in results["parity"].items():
        say(f"{stage}: PyTorch against ONNX " + ", ".join(f"{k} {v:.2g}" for k, v in values.items()))
    for kind, values in results.get("targets", {}).items():
        say(f"target {kind}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
    newest = version_of(releases(run.repository)[-1])
    serving = {int(server.state["version"]) for server in running(run)}
    said, command = what_follows(newest, serving, refusals(run.repository).get(newest, ""))
    if said:
        say(said)
    if command:
        say_next(command, run, artifacts)


def what_follows(newest: int, serving: set[int], refused: str) -> tuple[str, str]:
    """(what is said of the newest version, the verb that comes next), "" for none. ``serving``: versions that servers
    of the run serve; ``refused``: why one of them did not take the newest."""
    if serving == {newest}:
        return f"version {newest} is served already", ""
    if serving and refused:
        return f"version {newest} is the newest, and a server did not take it: {refused}", "train"
    return "", "publish" if serving else "serve"
