"""``vivace compress``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vivace.cli.options import (
    DEFAULT_ARTIFACTS,
    PRESETS,
    Artifacts,
    Bound,
    Force,
    Name,
    Precision,
    PresetName,
    Seed,
    chosen_preset,
    say,
)
from vivace.cli.runs import say_next, step
from vivace.cli.values import a_name, choice, one_of, values_of
from vivace.run import Run

TO_HELP = "teach a new run of this preset's sizes and training (or of a JSON file's) instead of pruning"
MIXTURES = values_of("training.models.ranking:MIXTURES")


def student(name: str, recovery: dict[str, Any]) -> Any:
    """The preset ``name`` with what the command line changes of its retriever's training."""
    from training.presets import preset, with_values

    parts = {"dropout": "encoder"}
    return with_values(preset(name), {f"{parts.get(k, 'retrieval')}.{k}": v for k, v in recovery.items()})


def compress(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    variant: Annotated[
        str, typer.Option(help="folder under artifacts/RUN/compressed", parser=a_name, metavar="NAME")
    ] = "small",
    layers: Annotated[int, typer.Option(help="layers left of the retriever (0: all)", min=0)] = 0,
    heads: Annotated[int, typer.Option(help="attention heads left in each layer (0: all)", min=0)] = 0,
    ffn: Annotated[int, typer.Option(help="feed-forward channels left (0: all)", min=0)] = 0,
    width: Annotated[int, typer.Option(help="embedding dimensions left (0: all)", min=0)] = 0,
    memory: Annotated[int, typer.Option(help="newest encoded events the ranker reads (0: all)", min=0)] = 0,
    ranker_heads: Annotated[int, typer.Option(help="attention heads of the ranker (0: as before)", min=0)] = 0,
    followers: Annotated[int, typer.Option(help="followers kept of an item for the ranker (0: as before)", min=0)] = 0,
    mixture: Annotated[str, choice("--mixture", MIXTURES, "of the ranker's heads, as before if empty")] = "",
    to: Annotated[
        str, typer.Option("--to", help=TO_HELP, parser=one_of(PRESETS, also_json=True), metavar="PRESET")
    ] = "",
    learning_rate: Annotated[
        float | None, typer.Option(help="of the recovery (3e-3, or that of --to)", min=1e-8, max=1.0)
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="of the recovery (0.1, or that of --to)", min=0.0, max=0.99)
    ] = None,
    sparsity: Annotated[str, typer.Option(help='of the encoder: "2:4", or a share of zeros such as 0.8')] = "",
    qat: Annotated[bool, typer.Option(help="recover with weights and activations rounded to eight bits")] = False,
    fresh: Annotated[bool, typer.Option(help="a new small model instead of the pruned one, taught likewise")] = False,
    epochs: Annotated[
        int | None, typer.Option(help="of training under the whole model's eye (4, or those of --to)", min=1)
    ] = None,
    precision: Precision = "fp32",
    bound: Bound = 0.01,
    force: Force = False,
) -> None:
    """Prune an evaluated run, let the whole model teach it, compile it, refuse it if it lost too much. --to cpu: a new
    run of that preset in the place of the pruned one."""
    with step(name, artifacts) as run:
        from preprocessing.features import Features
        from training.compile.compress import Compression, SmallerRanker, compress as compress_run
        from training.compile.prune import Target
        from training.learn.constraints import Constraint

        given = {"learning_rate": learning_rate, "dropout": dropout, "epochs": epochs}
        recovery = {key: value for key, value in given.items() if value is not None}
        sizes_of_ranker: dict[str, Any] = {"heads": ranker_heads, "followers": followers, "mixture": mixture}
        chosen: dict[str, Any] = {"precision": precision, "bound": bound, "force": force, **recovery}
        config = Compression(
            target=Target(layers=layers, heads=heads, ffn=ffn, width=width),
            ranker=SmallerRanker(memory=memory, **sizes_of_ranker),
            student=student(to, recovery) if to else None,
            fresh=fresh,
            constraint=Constraint(sparsity=sparsity, int8=qat),
            **chosen,
        )
        sizes = chosen_preset(preset, run.root)
        compress_run(Features(run.features), sizes, run.root, variant, config, seed, say)
    say("python -m benchmarks.graphs compares the speeds")
    say_next("serve", Run(run.variants / variant), artifacts)
