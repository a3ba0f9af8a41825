"""``vivace compile``."""

from __future__ import annotations

from typing import Annotated

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
    reported,
    say,
)


def compile_(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    precision: Precision = "fp32",
    tables: Tables = "fp32",
    fold: Annotated[bool, typer.Option(help="what depends on an item alone becomes a table of the catalogue")] = True,
    target: Annotated[
        list[str] | None, typer.Option(help="beside the CPU: openvino, cuda, tensorrt, tensorrt-rtx; may be repeated")
    ] = None,
    index: Annotated[str, typer.Option(help="candidates from a FAISS index: HNSW32 or HNSW32_SQ8 (else exact)")] = "",
    bound: Bound = 0.01,
    force: Force = False,
) -> None:
    """Export to ONNX, check against PyTorch (int8: by the quality gate), publish a new version of the repository."""
    from preprocessing.features import Features
    from training.compile.export import CompileConfig, compile_models
    from vivace.manifest import exclusive

    with reported():
        root = artifacts / name
        config = CompileConfig(precision, tables, fold, tuple(target or ()), index, bound=bound, force=force)
        with exclusive(root):
            manifest = compile_models(Features(root / "features"), chosen_preset(preset, root), root, seed, say, config)
        for stage, values in manifest["results"]["parity"].items():
            say(f"{stage}: PyTorch against ONNX " + ", ".join(f"{k} {v:.2g}" for k, v in values.items()))
        for kind, values in manifest["results"].get("targets", {}).items():
            say(f"target {kind}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
