"""``vivace pretrain --objective text``: masked-language modelling (Devlin et al. 2019) on the catalogue's text.

Writes ``artifacts/<name>/text``: tokenizer, weights, and one vector an item.
Axis legend: B texts, V items, S tokens, D width.
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
from training.checkpoints import device, finish_training, keep_only_own_checkpoint
from training.learn.loop import Loop, LoopConfig
from training.models.text_encoder import (
    FIRST_TOKEN,
    PAD,
    PROBE_ITEMS,
    TOKENIZER,
    VECTORS,
    TextConfig,
    TextEncoder,
    standardise,
    tokens_of,
    train_tokenizer,
)
from vivace.contract import FIRST_ID, TEXT
from vivace.manifest import Progress, Step, read_manifest
from vivace.run import Run


def _texts(features: Features) -> list[str]:
    """The items' texts. Raises ValueError where there are none to learn from."""
    texts: list[str] = features.items()[TEXT].tolist()
    if sum(bool(t.strip()) for t in texts) < 2:
        raise ValueError(
            f"pretrain text: the items of {features.schema.name} have no text; name a text column in the mapping, or "
            "leave the text encoder out"
        )
    return texts


def _loop(model: TextEncoder, config: TextConfig, rows_BS: Tensor, folder: Path, seed: int, quiet: bool) -> Loop:
    """Guesses tokens of all texts but PROBE_ITEMS, whose loss is watched."""
    order = torch.randperm(len(rows_BS), generator=torch.Generator().manual_seed(seed))
    probes = min(PROBE_ITEMS, len(rows_BS) // 4)
    held_out, learned = rows_BS[order[:probes]], rows_BS[order[probes:]]

    def of_epoch(epoch: int) -> Iterator[Tensor]:
        mixed = torch.randperm(len(learned), generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        for chosen in mixed.split(config.batch_size):
            batch = learned[chosen]
            yield batch[:, : int((batch != PAD).sum(1).max())].to(model.bias.device)

    def metric() -> dict[str, float]:
        if not len(held_out):
            return {"log_loss": 0.0}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            losses = [model.loss(part.to(model.bias.device), config.share)[0] for part in held_out.split(64)]
        return {"log_loss": float(torch.stack(losses).mean())}

    loop_config = LoopConfig(
        epochs=config.epochs, steps_per_epoch=-(-len(learned) // config.batch_size), weight_decay=0.01,
        learning_rate=config.learning_rate, warmup_steps=200, seed=seed,
    )  # fmt: skip
    loss = lambda batch: model.loss(batch, config.share)  # noqa: E731
    return Loop(model, loop_config, folder, "text", of_epoch, loss, metric, quiet)


def _item_vectors(model: TextEncoder, tokens_VS: Tensor) -> np.ndarray:
    """One vector an item id float32 [V, D], standardised; zero for the special ids and for items without text."""
    with torch.no_grad():
        pooled = torch.cat([model.pooled(part.to(model.bias.device)).cpu() for part in tokens_VS.split(256)])
    vectors = standardise(pooled, (tokens_VS >= FIRST_TOKEN).any(1))
    table: np.ndarray = torch.cat([torch.zeros(FIRST_ID, vectors.shape[1]), vectors]).numpy()
    return table


def pretrain_text(
    features: Features, config: TextConfig, root: Path, seed: int, say: Progress, quiet: bool = False
) -> dict[str, Any]:
    """Trains (or resumes, or finds) ``artifacts/<name>/text``; returns its manifest. Raises ValueError if the
    catalogue has no text."""
    prepared = read_manifest(features.folder, "vivace prepare")
    step = Step(Run(root).text, "pretrain text", asdict(config), seed, {"features": prepared["key"]})
    if (manifest := step.finished(say, "the text encoder is there")) is not None:
        return manifest
    texts = _texts(features)
    keep_only_own_checkpoint(step)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts, config.vocabulary)
    tokens_VS = tokens_of(tokenizer, texts, config.tokens)
    rows_BS = tokens_VS[(tokens_VS >= FIRST_TOKEN).any(1)]
    model = TextEncoder(config, tokenizer.get_vocab_size()).to(device())
    loop = _loop(model, config, rows_BS, step.folder, seed, quiet)
    loop.resume(say)
    report = loop.run()
    np.save(step.folder / VECTORS, _item_vectors(model, tokens_VS))
    tokenizer.save(str(step.folder / TOKENIZER))
    parameters = sum(p.numel() for p in model.parameters())
    return finish_training(step, model, report, parameters=parameters, texts=len(rows_BS))
