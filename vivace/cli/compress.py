"""``vivace compress``."""

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
    chosen_preset,
    reported,
    say,
)


def compress(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    variant: Annotated[str, typer.Option(help="folder under artifacts/<name>/compressed")] = "small",
    layers: Annotated[int, typer.Option(help="layers left of the retriever (0: all)")] = 0,
    heads: Annotated[int, typer.Option(help="attention heads left in each layer (0: all)")] = 0,
    ffn: Annotated[int, typer.Option(help="feed-forward channels left (0: all)")] = 0,
    width: Annotated[int, typer.Option(help="embedding dimensions left (0: all)")] = 0,
    memory: Annotated[int, typer.Option(help="newest encoded events the ranker reads (0: all)")] = 0,
    ranker_heads: Annotated[int, typer.Option(help="attention heads of the ranker (0: as before)")] = 0,
    followers: Annotated[int, typer.Option(help="followers kept of an item for the ranker (0: as before)")] = 0,
    mixture: Annotated[str, typer.Option(help='of the ranker\'s heads: "mmoe", "ple", "shared" ("": as before)')] = "",
    learning_rate: Annotated[float, typer.Option(help="of the recovery")] = 3e-3,
    dropout: Annotated[float, typer.Option(help="of the recovery")] = 0.1,
    sparsity: Annotated[str, typer.Option(help='of the encoder: "2:4", or a share of zeros such as 0.8')] = "",
    qat: Annotated[bool, typer.Option(help="recover with weights and activations rounded to eight bits")] = False,
    fresh: Annotated[bool, typer.Option(help="a new small model instead of the pruned one, taught likewise")] = False,
    epochs: Annotated[int, typer.Option(help="of recovery training under the whole model's eye")] = 4,
    precision: Precision = "fp32",
    bound: Bound = 0.01,
    force: Force = False,
) -> None:
    """Prune an evaluated run, let the whole model teach it, compile it, refuse it if it lost too much."""
    from preprocessing.features import Features
    from training.compile.compress import FOLDER, Compression, SmallerRanker
    from training.compile.compress import compress as run
    from training.compile.prune import Target
    from training.learn.constraints import Constraint
    from vivace.manifest import exclusive

    with reported():
        root = artifacts / name
        target, smaller = Target(layers, heads, ffn, width), SmallerRanker(memory, ranker_heads, followers, mixture)
        config = Compression(
            target,
            smaller,
            fresh,
            Constraint(sparsity, qat),
            epochs,
            learning_rate,
            dropout,
            precision=precision,
            bound=bound,
            force=force,
        )
        with exclusive(root):
            run(Features(root / "features"), chosen_preset(preset, root), root, variant, config, seed, say)
        say(f"vivace serve --name {name}/{FOLDER}/{variant}; python -m benchmarks.graphs compares the speeds")
