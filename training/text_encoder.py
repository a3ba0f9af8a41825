"""A Transformer over the catalogue's text, pretrained by masked-language modelling (Devlin et al. 2019) on that text.

``vivace pretrain --objective text`` writes ``artifacts/<name>/text``: tokenizer, weights, and one vector an item, which
the retriever reads where its configuration says ``text_encoder``. Axis legend: B items, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from preprocessing.contract import FIRST_ID, TEXT
from preprocessing.prepare import Features
from training.encoders import EncoderConfig, build_encoder
from training.loop import Loop, LoopConfig
from training.losses import full_softmax
from vivace.artifacts import Step, read_manifest

FOLDER, VECTORS, TOKENIZER, WEIGHTS = "text", "vectors.npy", "tokenizer.json", "weights.pt"
PAD, UNKNOWN, MASK, FIRST_TOKEN = 0, 1, 2, 3
SPECIAL = ["[PAD]", "[UNK]", "[MASK]"]
KEPT, REPLACED = 0.1, 0.1  # of the chosen tokens: left as they are, or replaced by a random one
PROBE_ITEMS = 512  # whose loss is watched


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder and of its training. ``share``: tokens to be guessed."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    tokens: int = 64
    vocabulary: int = 8000
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    share: float = 0.15


def train_tokenizer(texts: list[str], vocabulary: int, more: Sequence[str] = ()) -> Tokenizer:
    """Byte-pair encoding of lower-cased text in Unicode's compatibility form; ``more`` special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[*SPECIAL, *more], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, texts: list[str], length: int) -> Tensor:
    """Token ids int64 [B, length] of each text's first tokens, padded on the right."""
    out = np.zeros((len(texts), length), np.int64)
    for row, found in enumerate(tokenizer.encode_batch(texts)):
        ids = found.ids[:length]
        out[row, : len(ids)] = ids
    return torch.from_numpy(out)


class TextEncoder(nn.Module):
    """Tokens int64 [B, S] to states float32 [B, S, D]; every token sees every other."""

    def __init__(self, config: TextConfig, vocabulary: int) -> None:
        super().__init__()
        shape = EncoderConfig(
            width=config.width, layers=config.layers, heads=config.heads, history=config.tokens, family="bert4rec",
            dropout=0.1, position_bias="relative",
        )  # fmt: skip
        self.token = nn.Embedding(vocabulary, config.width, padding_idx=PAD)
        self.encoder = build_encoder(shape, config.tokens)
        self.norm = nn.LayerNorm(config.width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        embedded = self.token(tokens_BS) * self.token.embedding_dim**0.5
        states: Tensor = self.norm(self.encoder(embedded, tokens_BS != PAD))
        return states

    def loss(self, tokens_BS: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """(mean loss of guessing ``share`` of the tokens, their number)."""
        real = tokens_BS >= FIRST_TOKEN
        chosen = (torch.rand(tokens_BS.shape, device=tokens_BS.device) < share) & real
        chosen |= (~chosen.any(1, keepdim=True)) & (real.cumsum(1) == 1) & real  # at least one of each text
        how = torch.rand(tokens_BS.shape, device=tokens_BS.device)
        other = torch.randint(FIRST_TOKEN, len(self.bias), tokens_BS.shape, device=tokens_BS.device)
        seen = torch.where(how < KEPT, tokens_BS, torch.where(how < KEPT + REPLACED, other, MASK))
        states = self(torch.where(chosen, seen, tokens_BS))[chosen]
        return full_softmax(states, self.token.weight, self.bias, tokens_BS[chosen], FIRST_TOKEN), chosen.sum()

    def pooled(self, tokens_BS: Tensor) -> Tensor:
        """Mean state of each text's tokens float32 [B, D]; zero for a text without any."""
        known = (tokens_BS != PAD)[:, :, None].float()
        mean: Tensor = (self(tokens_BS) * known).sum(1) / known.sum(1).clamp_min(1)
        return mean


def standardise(vectors: Tensor, real: Tensor) -> Tensor:
    """Zero mean and unit variance over the ``real`` rows; the others are zero."""
    mean, deviation = vectors[real].mean(0), vectors[real].std(0).clamp_min(1e-6)
    return torch.where(real[:, None], (vectors - mean) / deviation, torch.zeros_like(vectors))


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
        model, LoopConfig(config.epochs, steps, config.learning_rate, 0.01, 200, 1.0, 0, 30.0, seed), step.folder,
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


def item_vectors(root: Path) -> np.ndarray:
    """Vectors of all item ids float32 [V, D] that ``pretrain_text`` wrote."""
    read_manifest(root / FOLDER, "vivace pretrain --objective text")
    found: np.ndarray = np.load(root / FOLDER / VECTORS)
    return found
