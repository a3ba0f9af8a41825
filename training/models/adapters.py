"""Fine-tuning few parameters of a retriever that was trained before: LoRA (Hu et al. 2021, by ``peft``) and bottleneck
adapters (Houlsby et al. 2019). The frozen backbone keeps what it learned; LoRA is merged into it at the end, so what
is exported and served has the same form and cost as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from training.models.retrieval import RetrievalModel
from vivace.checks import check_fields

LORA_TARGETS = ["qkv", "out", "up", "down", "uvqk"]


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Which parameters of a retriever that was trained before are trained now."""

    method: Literal["full", "lora", "adapter"] = "full"
    """"full": all; "lora": updates of low rank to the encoder's matrices; "adapter": the bottlenecks that
    ``EncoderConfig.adapter`` puts into each block."""
    rank: int = 8
    """Of LoRA's updates."""
    items: bool = True
    """Item embeddings and biases are trained as well, as they must be on new items."""

    def __post_init__(self) -> None:
        check_fields(self, {"method": "--adapt", "rank": "--rank"})
        if self.rank < 1:
            raise ValueError(f"--rank: expected at least 1, got {self.rank}")


def freeze_for(model: RetrievalModel, adaptation: Adaptation) -> dict[str, int]:
    """Prepares ``model`` in place; the numbers of trained and of all parameters."""
    if adaptation.method != "full":
        for p in model.parameters():
            p.requires_grad = False
    if adaptation.method == "lora":
        config = LoraConfig(r=adaptation.rank, lora_alpha=2 * adaptation.rank, target_modules=LORA_TARGETS)
        inject_adapter_in_model(config, model.encoder)
        if not any(isinstance(m, LoraLayer) for m in model.encoder.modules()):
            raise ValueError(f"--adapt lora: the {model.config.family} encoder has no layer of {LORA_TARGETS}")
    if adaptation.method == "adapter":
        bottlenecks = [p for name, p in model.encoder.named_parameters() if ".adapter." in name]
        if not bottlenecks:
            raise ValueError("--adapt adapter: set EncoderConfig.adapter (family sasrec or bert4rec) in the preset")
        for p in bottlenecks:
            p.requires_grad = True
    if adaptation.items and adaptation.method != "full":
        for p in (*model.items.parameters(), model.bias):
            p.requires_grad = True
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained_parameters": trained, "parameters": sum(p.numel() for p in model.parameters())}


def merge(model: RetrievalModel) -> None:
    """Folds LoRA updates into the matrices they belong to; afterwards the model has its first form."""
    for parent in list(model.encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                child.merge()
                base = child.get_base_layer()
                assert isinstance(base, nn.Module)
                setattr(parent, name, base)
    for p in model.parameters():
        p.requires_grad = True
