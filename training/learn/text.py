"""``vivace pretrain --objective text``: masked-language modelling (Devlin et al. 2019) on the catalogue's text.

Writes ``artifacts/<name>/text``: tokenizer, weights, and one vector an item.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preprocessing.features import Features
from training.learn.loop import Loop, LoopConfig
from training.models.text_encoder import (
    FIRST_TOKEN,
    FOLDER,
    PAD,
    PROBE_ITEMS,
    TOKENIZER,
    VECTORS,
    WEIGHTS,
    TextConfig,
    TextEncoder,
    standardise,
    tokens_of,
    train_tokenizer,
)
from vivace.contract import FIRST_ID, TEXT
from vivace.manifest import Step, read_manifest


def pretrain_text(
    features: Features, config: TextConfig, root: Path, seed: int, say: Any, quiet: bool = False
) -> dict[str, Any]:
    """Trains (or resumes, or finds) ``artifacts/<name>/text``; returns its manifest. Raises ValueError if the
    catalogue has no text."""
    prepared = read_manifest(features.folder, "vivace prepare")
    step = Step(root / FOLDER, "pretrain text", asdict(config), seed, {"features": prepared["key"]})
    if step.done():
        say("the text encoder is there: nothing to do")
        assert step.manifest is not None
        return step.manifest
    texts = features.items()[TEXT].tolist()
    if sum(bool(t.strip()) for t in texts) < 2:
        raise ValueError(
            f"pretrain text: the items of {features.schema.name} have no text; name a text column in the mapping, or "
            "leave the text encoder out"
        )
    step.reset()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts, config.vocabulary)
    tokens = tokens_of(tokenizer, texts, config.tokens)
    rows = tokens[(tokens >= FIRST_TOKEN).any(1)]
    model = TextEncoder(config, tokenizer.get_vocab_size())
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    probes = min(PROBE_ITEMS, len(rows) // 4)
    held_out, learned = rows[order[:probes]], rows[order[probes:]]

    def batches(epoch: int) -> Iterator[Tensor]:
        mixed = torch.randperm(len(learned), generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        for chosen in mixed.split(config.batch_size):
            batch = learned[chosen]
            yield batch[:, : int((batch != PAD).sum(1).max())].to(model.bias.device)

    def metric() -> dict[str, float]:
        if not len(held_out):
            return {"log_loss": 0.0}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            found = [model.loss(part.to(model.bias.device), config.share)[0] for part in held_out.split(64)]
        return {"log_loss": float(torch.stack(found).mean())}

    steps = -(-len(learned) // config.batch_size)
    loop = Loop(
        model,
        LoopConfig(
            epochs=config.epochs, steps_per_epoch=steps, learning_rate=config.learning_rate, weight_decay=0.01,
            warmup_steps=200, seed=seed,
        ),
        step.folder,
        "text", batches, lambda batch: model.loss(batch, config.share), metric, quiet,
    )  # fmt: skip
    if loop.resume():
        say(f"text encoder: resumed at epoch {loop.epoch + 1}, step {loop.step}")
    report = loop.run()
    with torch.no_grad():
        pooled = torch.cat([model.pooled(part.to(model.bias.device)).cpu() for part in tokens.split(256)])
    vectors = standardise(pooled, (tokens >= FIRST_TOKEN).any(1))
    special = torch.zeros(FIRST_ID, config.width)
    np.save(step.folder / VECTORS, torch.cat([special, vectors]).numpy())
    tokenizer.save(str(step.folder / TOKENIZER))
    torch.save(model.state_dict(), step.folder / WEIGHTS)
    (step.folder / "checkpoint.pt").unlink(missing_ok=True)
    return step.finish(
        report.pop("seconds"), **report, parameters=sum(p.numel() for p in model.parameters()), texts=len(rows)
    )
