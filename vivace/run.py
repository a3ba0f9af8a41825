"""One run: the folder ``artifacts/<name>``, its layout, and whether its parts still belong together.

    run = Run(Path("artifacts/shop"))
    run.graph(contract.RETRIEVAL)      # artifacts/shop/compiled/retrieval.onnx
    run.manifest("retrieval")          # refused where the features are no longer those it was trained on

A compressed variant, ``artifacts/<name>/compressed/<variant>``, is a run of its own that shares the features and the
store of the whole one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vivace.contract import DataSchema, StageTensors
from vivace.manifest import MANIFEST, read_manifest

FEATURES, RETRIEVAL, RANKING, CONTROL = "features", "retrieval", "ranking", "ranking_control"
TEXT, PRETRAINED, SEARCH, EVALUATION, COMPILED = "text", "pretrained", "query_search", "evaluation", "compiled"
COMPRESSED = "compressed"
FINAL = "final"  # the models fitted again on all events: what is served, and what no evaluation of the log may judge
TEACHER, REFERENCE = "teacher", "reference"  # of a variant: the whole run's retriever, and its evaluation

RECORDED_PARTS = ("test", "valid")  # of the split: what ``vivace compile`` records requests of

MADE_BY = {
    FEATURES: "vivace prepare",
    TEXT: "vivace pretrain --objective text",
    PRETRAINED: "vivace pretrain",
    RETRIEVAL: "vivace train",
    RANKING: "vivace train",
    CONTROL: "vivace train --control",
    FINAL: "vivace train --final",
    SEARCH: "vivace train --task search",
    EVALUATION: "vivace evaluate",
    COMPILED: "vivace compile",
}


class StaleError(ValueError):
    """A part of a run was made from another state of the part before it."""


@dataclass(frozen=True)
class Run:
    """Paths and records of ``artifacts/<name>``; ``root`` is that folder. ``features_at``: features that lie elsewhere,
    for experiments that share them."""

    root: Path
    features_at: Path | None = None

    # -- folders of the steps ------------------------------------------------------------------------
    @property
    def whole(self) -> Run:
        """The run that a compressed variant was made of; a whole run itself."""
        if self.root.parent.name != COMPRESSED:
            return self
        return Run(self.root.parents[1], self.features_at)

    @property
    def features(self) -> Path:
        return self.features_at or self.whole.root / FEATURES

    @property
    def feature_store(self) -> Path:
        return self.whole.root / "feature_store"

    @property
    def retrieval(self) -> Path:
        return self.root / RETRIEVAL

    @property
    def ranking(self) -> Path:
        return self.root / RANKING

    @property
    def final(self) -> Run:
        """Where the final fit lies, a folder of models like a run's own."""
        return Run(self.root / FINAL, self.features)

    @property
    def evaluation(self) -> Path:
        return self.root / EVALUATION

    @property
    def compiled(self) -> Path:
        return self.root / COMPILED

    @property
    def repository(self) -> Path:
        """Triton's model repository."""
        return self.root / "model_repository"

    @property
    def variants(self) -> Path:
        """Folder of the compressed variants, each a run."""
        return self.root / COMPRESSED

    @property
    def search(self) -> Path:
        return self.root / SEARCH

    @property
    def text(self) -> Path:
        return self.features.parent / TEXT

    @property
    def pretrained(self) -> Path:
        return self.root / PRETRAINED

    @property
    def optimized(self) -> Path:
        """Studies of ``vivace optimize``."""
        return self.root / "optimized"

    @property
    def hugectr(self) -> Path:
        """The events as HugeCTR reads them."""
        return self.root / "hugectr"

    @property
    def tuning(self) -> Path:
        return self.root / "tuning"

    @property
    def servers(self) -> Path:
        """Word of the servers that run: where each listens for ``vivace publish``."""
        return self.root / "servers"

    # -- files ---------------------------------------------------------------------------------------
    @property
    def preset(self) -> Path:
        return self.root / "preset.json"

    @property
    def server_log(self) -> Path:
        return self.root / "triton.log"

    @property
    def card_file(self) -> Path:
        return self.compiled / "model_card.json"

    def requests_file(self, part: str = "test") -> Path:
        """Recorded requests of a part of the split: "test" for load and parity, "valid" for what is chosen by
        quality. Raises ValueError for another."""
        if part not in RECORDED_PARTS:
            raise ValueError(f"recorded requests: expected one of {RECORDED_PARTS}, got {part!r}")
        return self.compiled / ("requests.parquet" if part == "test" else f"requests_{part}.parquet")

    def graph(self, stage: str) -> Path:
        """ONNX file of a compiled stage."""
        return self.compiled / f"{stage}.onnx"

    def step(self, name: str) -> Path:
        """Folder of a step by the names of ``MADE_BY``."""
        return {FEATURES: self.features, TEXT: self.text}.get(name, self.root / name)

    # -- records -------------------------------------------------------------------------------------
    def has(self, name: str) -> bool:
        """Whether a step is finished."""
        return (self.step(name) / MANIFEST).exists()

    def command(self, name: str) -> str:
        """What to type to make a step."""
        if self.whole == self or name in (FEATURES, TEXT):
            return f"{MADE_BY[name]} --name {self.whole.root.name}"
        return f"vivace compress --name {self.whole.root.name} --variant {self.root.name}"

    def _source(self, part: str) -> tuple[Run, str] | None:
        """The run and the step that an input of a manifest names; None for one that no step of a run makes."""
        if part in MADE_BY:
            return self, part
        of_variant = {TEACHER: RETRIEVAL, REFERENCE: EVALUATION}
        if part in of_variant and self.whole != self:
            return self.whole, of_variant[part]
        return None

    def manifest(self, name: str) -> dict[str, Any]:
        """Manifest of a finished step whose inputs are still those it was made from, all the way back to the features.

        Raises FileNotFoundError where the step or one that it was made from is missing and StaleError where a part
        before it was made anew since; both name the command to run.
        """
        record = read_manifest(self.step(name), self.command(name))
        sources = {part: source for part in record["inputs"] if (source := self._source(part)) is not None}
        keys = {part: run.key(step) for part, (run, step) in sources.items()}  # the earliest step to run is named first
        for part, (run, step) in sources.items():
            if keys[part] != record["inputs"][part]:
                raise StaleError(
                    f"{self.step(name)}: made from other {part} (key {record['inputs'][part]}) than what "
                    f"{run.step(step)} holds now (key {keys[part]}); run '{self.command(name)}' again"
                )
        return record

    def key(self, name: str) -> str:
        """Key of a finished step whose inputs are still those it was made from: see ``manifest``."""
        return str(self.manifest(name)["key"])

    def doubt(self) -> str:
        """Why what is published no longer fits the features and models that are there; "" where it does, and where the
        repository came alone."""
        try:
            self.manifest(COMPILED)
        except StaleError as error:
            return str(error)
        except FileNotFoundError:
            pass
        return ""

    def schema(self) -> DataSchema:
        """The data set's schema: as compiled, or as prepared where nothing is compiled yet."""
        compiled = self.compiled / "schema.json"
        return DataSchema.load(compiled if compiled.exists() else self.features / "schema.json")

    def heads(self) -> list[str]:
        """Names of the task heads; the first orders the answer."""
        return [head.name for head in self.schema().heads]

    def card(self) -> dict[str, Any]:
        """The model card. Raises FileNotFoundError that names the command to run."""
        if not self.card_file.exists():
            raise FileNotFoundError(f"{self.card_file}: not there yet; run '{MADE_BY[COMPILED]}' first")
        card: dict[str, Any] = json.loads(self.card_file.read_text())
        return card

    def shapes(self) -> StageTensors:
        """The tensors between the compiled stages."""
        return StageTensors(**self.card()["shapes"])

    def version(self) -> int:
        """The version that ``vivace compile`` published last."""
        return int(read_manifest(self.compiled, self.command(COMPILED))["results"]["version"])
