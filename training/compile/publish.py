"""A compiled run as a new version of its model repository, with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.features import CATALOGUE_FILE, REQUEST_GRAPH, Features
from preprocessing.sequences import WHOLE
from search import published as search
from serving import repository
from serving.runtime.encoded import ENCODER, POPULAR, ROWS
from serving.runtime.explore import COUNTS_FILE
from serving.runtime.fresh import GRAPH, STATE_GRAPH
from serving.runtime.item_index import GROUPS, INDEX
from serving.runtime.new_items import FILES as NEW_ITEM_FILES
from serving.runtime.ruled import ATTRIBUTES, SCHEMA as SCHEMA_FILE, write_attributes
from training.compile.engine import Engine
from training.compile.shards import shard_file
from training.compile.targets import files as plans
from training.data.counters import popularity
from training.data.drift import reference
from training.judge.evaluate import brings_test
from training.presets import Preset
from vivace import contract
from vivace.context import CONTEXT_FILE, CONTEXT_GRAPH, TYPES_GRAPH, ContextColumns
from vivace.drift import FILE as DRIFT_FILE
from vivace.limits import CountLimits
from vivace.live import RECENT
from vivace.live_shown import RECENT_SHOWN
from vivace.manifest import finite, plain, write_json, write_text
from vivace.run import EVALUATION, FEATURES, FINAL, RANKING, RETRIEVAL, Run, StaleError
from vivace.shard_contract import shard_model
from vivace.step_contract import ENCODER_STEP, SCORING

ITEMS_FILE = "items.json"


def _quality(run: Run) -> dict[str, Any] | str:
    """What ``vivace evaluate`` found of the models that are compiled; of a final fit, of those it went on from."""
    try:
        results: dict[str, Any] = run.manifest(EVALUATION)["results"]
    except FileNotFoundError:
        return "not evaluated"
    except StaleError:
        return "not evaluated: the evaluation that is there is of other models"
    return results


def model_card(
    features: Features, run: Run, tensors: contract.StageTensors, seed: int, parity: dict[str, Any]
) -> dict[str, Any]:
    """Data, configuration, seed, commit and quality of what is served, beside the models."""
    manifests = {name: run.manifest(name) for name in (FEATURES, RETRIEVAL, RANKING)}
    final = run.manifest(FINAL)["results"]["card"] if run.has(FINAL) else "none: served as judged"
    return {
        "data": features.schema.name,
        "final_fit": final,
        "licence": features.schema.licence,
        "shapes": tensors.__dict__,
        "seed": seed,
        "parity": parity,
        "quality": _quality(run),
        **{n: {k: m[k] for k in ("key", "config", "commit", "versions", "finished")} for n, m in manifests.items()},
    }


def _files(features: Features, run: Run, folder: Path, tensors: contract.StageTensors) -> dict[str, dict[str, Path]]:
    """What goes into the new version, by model and name."""
    built, of_search = plans(folder), search.files_of(run.root)
    shards = range(tensors.shards)
    drift = [DRIFT_FILE] if (folder / DRIFT_FILE).exists() else []
    there = [ROWS] if (folder / ROWS).exists() else []
    if tensors.shards:
        retrieval = {name: folder / name for name in (ENCODER, POPULAR)}
    elif tensors.indexed:
        retrieval = {name: folder / name for name in (ENCODER, INDEX, GROUPS, POPULAR, *there)}
    else:
        retrieval = {"model.onnx": folder / "retrieval.onnx", **built.get(contract.RETRIEVAL, {})}
        retrieval |= {name: folder / name for name in (ENCODER_STEP, SCORING) if (folder / name).exists()}
    graphs = [TYPES_GRAPH] if tensors.types else []
    graphs += [CONTEXT_GRAPH] if tensors.context or tensors.amounts or tensors.counted else []
    fresh_graphs = [GRAPH, *([STATE_GRAPH] if tensors.context or tensors.amounts else [])] if tensors.fresh else []
    names = (*NEW_ITEM_FILES, SCHEMA_FILE) if tensors.fresh else ()
    fresh = {contract.UPDATE_STORE: {name: folder / name for name in names}}
    response = {name: folder / name for name in (ITEMS_FILE, COUNTS_FILE, ATTRIBUTES, SCHEMA_FILE)}
    response |= of_search.pop(contract.RESPONSE, {})
    return {
        contract.FEATURE_TRANSFORM: {
            "transform.onnx": features.folder / REQUEST_GRAPH,
            CONTEXT_FILE: features.folder / CONTEXT_FILE,
            **{name: features.folder / name for name in graphs},
            **({RECENT: folder / RECENT} if tensors.rising else {}),
            **({RECENT_SHOWN: folder / RECENT_SHOWN} if tensors.shown else {}),
        },
        contract.RETRIEVAL: retrieval,
        **{shard_model(i): {"model.onnx": shard_file(folder, i)} for i in shards},
        contract.RANKING: {
            "model.onnx": folder / "ranking.onnx",
            **{name: folder / name for name in fresh_graphs},
            **built.get(contract.RANKING, {}),
        },
        contract.RESPONSE: response,
        **of_search,
        **fresh,
        contract.ENSEMBLE: {name: folder / name for name in (run.card_file.name, *drift)},
    }


def publish(
    features: Features, preset: Preset, run: Run, folder: Path, tensors: contract.StageTensors, card: dict[str, Any]
) -> int:
    """Writes items, schema, card and what drift is held to beside the graphs in ``folder`` and puts all into the model
    repository; returns the version."""
    schema, gate = features.schema, finite(plain(card["gate"]))
    write_text(folder / ITEMS_FILE, json.dumps(features.items()[contract.ITEM].tolist(), ensure_ascii=False))
    write_text(folder / SCHEMA_FILE, json.dumps(schema.to_json()))
    write_json(folder / run.card_file.name, card)
    counts_V = popularity(features.files(WHOLE if run.has(FINAL) else "train"), tensors.items)
    write_attributes(features.folder / CATALOGUE_FILE, schema, folder / ATTRIBUTES)
    np.save(folder / COUNTS_FILE, np.minimum(counts_V, 255).astype(np.uint8))
    learned = run.has(FINAL) and not brings_test(features)
    if (then := reference(features, preset, tensors, Engine(folder, tensors), learned)) is not None:
        then.save(folder / DRIFT_FILE)
    if tensors.rising:
        columns = features.context if tensors.counted else ContextColumns()
        limits = CountLimits.of(tensors)
        features.stream(columns, limits).save(folder / RECENT, features.log_number())
        if tensors.shown:
            features.shown(limits).save(folder / RECENT_SHOWN)
    metadata = {"precision": card["precision"], "tables": card["tables"], "gate": json.dumps(gate)}
    metadata[contract.DATA] = schema.name
    return repository.assemble(
        run.repository,
        tensors,
        schema.heads,
        _files(features, run, folder, tensors),
        exclude_seen=schema.exclude_seen,
        metadata=metadata,
    )
