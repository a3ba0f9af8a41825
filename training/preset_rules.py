"""Which settings of a preset nothing reads without another: one that is named all the same is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reader:
    """Who reads a setting: one of ``names`` with one of ``values``; without those, one that is above 0 or true."""

    names: tuple[str, ...]
    values: tuple[str, ...] = ()

    def reads(self, given: Mapping[str, Any]) -> bool:
        """Whether it does where the settings are as ``given``, by dotted name."""
        return any(given[name] in self.values if self.values else given[name] for name in self.names)

    def __str__(self) -> str:
        wanted = " or ".join(map(repr, self.values)) if self.values else "set"
        return f"{' or '.join(self.names)} {wanted}"


RISING = (Reader(("ranker.rising",)),)
LINEAR = (Reader(("encoder.neighbours",)), Reader(("encoder.neighbours_by",), ("linear",)))
BLOCKS = (Reader(("encoder.family",), ("sasrec", "bert4rec")),)

# all readers of a setting are needed; retrieval.label_smoothing and ranker.shown_rates are refused where presets are
# made, as they are not even inherited
READ_WITH: dict[str, tuple[Reader, ...]] = {
    "encoder.ffn_factor": BLOCKS,
    "encoder.ffn_width": BLOCKS,
    "encoder.head_width": BLOCKS,
    "encoder.adapter": BLOCKS,
    "encoder.position_bias": (Reader(("encoder.family",), ("sasrec", "bert4rec", "hstu")),),
    "encoder.id_dropout": (Reader(("encoder.attributes", "encoder.text_tokens", "encoder.text_encoder")),),
    "encoder.neighbours_by": LINEAR[:1],
    "encoder.neighbours_ridge": LINEAR,
    "retrieval.negatives": (Reader(("retrieval.loss",), ("sampled", "gbce")),),
    "retrieval.negative_power": (Reader(("retrieval.loss",), ("sampled",)),),
    "retrieval.calibration": (Reader(("retrieval.loss",), ("gbce",)),),
    "retrieval.tower": (Reader(("retrieval.new_items",), ("tower",)),),
    "retrieval.adversarial_weight": (Reader(("retrieval.adversarial",)),),
    "retrieval.mask_share": (Reader(("encoder.family",), ("bert4rec",)),),
    "retrieval.patience": (Reader(("retrieval.probe_users",)),),
    "ranker.nearest_to": (Reader(("ranker.nearest",)),),
    "ranker.experts": (Reader(("ranker.mixture",), ("mmoe", "ple")),),
    "ranker.by_context": RISING,
    "ranker.rising_same_item_s": RISING,
    "ranker.rising_user_events": RISING,
    "ranker.rising_newcomers": RISING,
    "ranking.patience": (Reader(("ranking.held_out",)),),
}


def unread(name: str, given: Mapping[str, Any]) -> Reader | None:
    """Who would read the setting ``name``, where all settings are as ``given``, by dotted name, and nothing does."""
    return next((reader for reader in READ_WITH.get(name, ()) if not reader.reads(given)), None)


def check_read(given: Mapping[str, Any], defaults: Mapping[str, Any], named: Collection[str]) -> None:
    """Raises ValueError for a setting that is ``named`` and that nothing reads, all settings being as ``given``, by
    dotted name. One that is as it is by default says nothing."""
    for name in named:
        reader = None if given[name] == defaults[name] else unread(name, given)
        if reader is not None:
            got = ", ".join(f"{other} {given[other]!r}" for other in reader.names)
            raise ValueError(
                f"{name} {given[name]!r} is read by nothing here: expected {reader} beside it, got {got}; set that, or "
                f"leave {name} out"
            )
