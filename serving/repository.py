"""Renders every ``config.pbtxt`` from the contract and assembles a servable repository from compiled artifacts.

``model_repository/`` in the checkout holds the default rendering (a test compares it); ``assemble`` writes the one of
a trained data set, whose shapes and heads it is rendered for, as numbered versions.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from serving.profiles import ENSEMBLE, PROFILES as PROFILES, ServingProfile as ServingProfile
from serving.releases import publishing
from serving.runtime.batch_sizes import padded_sizes
from vivace import contract
from vivace.explain_contract import EXPLAIN, EXPLAIN_INPUTS, EXPLAIN_OUTPUTS
from vivace.run import Run
from vivace.shard_contract import SHARD_PREFIX, shard_inputs, shard_model, shard_outputs

CHECKOUT_REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"
ADAPTERS = Path(__file__).resolve().parent / "triton" / "adapters"
INDEX_ADAPTER, SHARDS_ADAPTER, FRESH_ADAPTER, SEARCH_ADAPTER = (
    ADAPTERS / f"{name}.py" for name in ("indexed_retrieval", "sharded_retrieval", "fresh_ranking", "query_search")
)
FEATURE_STORE = "../feature_store"  # seen from the repository's folder
TUNED = Run(Path()).tuning.name  # folder of a run with the records of tuned profiles
STORE_MODELS = (contract.APPEND_EVENT, contract.UPDATE_STORE)  # beside the ensemble
BESIDE = (*STORE_MODELS, EXPLAIN)  # the same, with what only reads
MAX_EXPLAINS = 8  # calls of ``explain`` that wait; each takes as long as several of ``recommend``
ONNX_STAGES = (contract.RETRIEVAL, contract.RANKING)
ALL_MODELS = (*contract.STAGES, contract.QUERY_SEARCH, *BESIDE, contract.ENSEMBLE)


Tensors = tuple[contract.WireTensor, ...]


DEFAULT_SHAPES = contract.StageTensors(
    history=50, candidates=100, items=5_000 + contract.FIRST_ID, width=64
)  # the demo shop's
DEFAULT_HEADS = (contract.TaskHead("click", float("-inf")), contract.TaskHead("buy", 3.0))


def _io(message, tensors: tuple[contract.WireTensor, ...], ragged: tuple[str, ...] = ()) -> None:  # noqa: ANN001
    for tensor in tensors:
        entry = message.add(name=tensor.name, data_type=pb.DataType.Value(tensor.config_datatype), dims=tensor.dims)
        if tensor.name in ragged:
            entry.allow_ragged_batch = True
        if tensor.optional:
            entry.optional = True


def _by_place(tensors: Tensors, side: str, backend: str) -> Tensors:
    """Tensors of a model by the names that its backend knows: Triton's backend for AOTInductor packages calls them by
    their place, "INPUT__0" (README of pytorch_backend, "Ordinal Base I/O Names")."""
    if backend != "pytorch":
        return tensors
    return tuple(replace(tensor, name=f"{side}__{place}") for place, tensor in enumerate(tensors))


def _base(
    name: str, backend: str, profile: ServingProfile, inputs: Tensors, outputs: Tensors, instances: int = 1
) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=profile.max_batch_size)
    _io(config.input, _by_place(inputs, "INPUT", backend), ragged=(contract.HISTORY.name,))
    _io(config.output, _by_place(outputs, "OUTPUT", backend))
    kind = f"KIND_{'CPU' if backend == 'python' else profile.kind}"
    config.instance_group.add(count=instances, kind=pb.ModelInstanceGroup.Kind.Value(kind))
    config.dynamic_batching.max_queue_delay_microseconds = profile.queue_delay_us
    size = profile.preferred_batch
    while 0 < size <= profile.max_batch_size:
        config.dynamic_batching.preferred_batch_size.append(size)
        size *= 2
    if name in STORE_MODELS or name.startswith(SHARD_PREFIX):  # with any policy Triton 2.51 leaves some of
        return config  # their requests waiting for up to half a second: it misses that the instance is free again. The
    # guard bounds how many of the first there are, and of the second there are as few as instances that ask
    policy = config.dynamic_batching.default_queue_policy
    policy.timeout_action = pb.ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = profile.queue_timeout_us
    policy.allow_timeout_override = True
    policy.max_queue_size = profile.max_queue
    return config


def _graph(config: pb.ModelConfig, profile: ServingProfile) -> pb.ModelConfig:
    """Settings of the backend that runs a graph, by the names that Triton's own backends read."""
    p = profile
    if p.backend == "onnxruntime":
        for key in ("intra_op_thread_count", "inter_op_thread_count"):
            config.parameters[key].string_value = str(p.threads)
        if p.kind == "GPU":  # options of ONNX Runtime's CUDA provider; its CUDA graphs: docs/decisions.md says why not
            cuda = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
            cuda.parameters["use_ep_level_unified_stream"] = "1"
    if p.backend == "openvino":
        config.default_model_filename = "model.onnx"
        settings = {"INFERENCE_NUM_THREADS": str(p.threads), "NUM_STREAMS": "1"}
        for key, value in settings.items():
            config.parameters[key].string_value = value
    if p.backend == "pytorch":
        config.default_model_filename = "model.pt2"  # Triton 2.51 would write model.pt there
        if p.container:
            config.platform = "torch_aoti"
        settings = {"INFERENCE_MODE": "true", "INTRA_OP_THREAD_COUNT": str(p.threads)}
        for key, value in settings.items():
            config.parameters[key].string_value = value
    if p.backend == "tensorrt" and p.cuda_graphs:
        config.optimization.cuda.graphs = True
        for size in padded_sizes(p.max_batch_size):
            spec = config.optimization.cuda.graph_spec.add(batch_size=size)
            for tensor in config.input:
                spec.input[tensor.name].dim.extend(tensor.dims)
    return config


def _backend(model: str, s: contract.StageTensors, profile: ServingProfile) -> str:
    """Backend of a model that is no ensemble."""
    ours = (model == contract.RETRIEVAL and s.lists_seen) or (model == contract.RANKING and s.fresh)
    graph = model in ONNX_STAGES and not ours
    return profile.backend if graph else "python"


def _ensemble(
    s: contract.StageTensors, heads: tuple[contract.TaskHead, ...], profile: ServingProfile
) -> pb.ModelConfig:
    config = pb.ModelConfig(name=contract.ENSEMBLE, platform="ensemble", max_batch_size=profile.max_batch_size)
    _io(config.input, contract.REQUEST)
    _io(config.output, contract.response_outputs(s, heads))
    steps = (
        (contract.FEATURE_TRANSFORM, contract.REQUEST, contract.feature_transform_outputs(s)),
        (contract.RETRIEVAL, contract.retrieval_stage_inputs(s), contract.retrieval_stage_outputs(s)),
        (contract.RANKING, contract.ranking_stage_inputs(s), contract.ranking_outputs(s, heads)),
        (contract.RESPONSE, contract.response_inputs(s, heads), contract.response_outputs(s, heads)),
        *([(contract.QUERY_SEARCH, contract.query_search_inputs(s), (contract.FOUND,))] if s.search else []),
    )
    for model, inputs, outputs in steps:
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        backend = _backend(model, s, profile)
        for tensor, its_name in zip(inputs, _by_place(inputs, "INPUT", backend), strict=True):
            step.input_map[its_name.name] = tensor.name
        for tensor, its_name in zip(outputs, _by_place(outputs, "OUTPUT", backend), strict=True):
            step.output_map[its_name.name] = tensor.name
    return config


def _transforms(config: pb.ModelConfig, s: contract.StageTensors, exclude_seen: bool) -> None:
    """What a model reads that turns raw requests into tensors."""
    config.parameters["shapes"].string_value = json.dumps(asdict(s))
    config.parameters["feature_store"].string_value = FEATURE_STORE
    config.parameters["exclude_seen"].string_value = str(exclude_seen).lower()


def _served(s: contract.StageTensors, profile: ServingProfile) -> contract.StageTensors:
    """Fresh items join where the ranking stage is ours: under other backends it is a graph alone, and a query finds
    them, but nothing recommends them."""
    ours = profile.backend == "onnxruntime" and profile.kind == "CPU"
    return s if ours else replace(s, fresh=0, rising_fresh=0)


def _fused(
    s: contract.StageTensors, heads: tuple[contract.TaskHead, ...], profile: ServingProfile, exclude_seen: bool
) -> pb.ModelConfig:
    """All stages as one Python model; it reads the graphs of the other stages' folders."""
    outputs = contract.response_outputs(s, heads)
    config = _base(contract.ENSEMBLE, "python", profile, contract.REQUEST, outputs, profile.recommend_instances)
    _transforms(config, s, exclude_seen)
    config.parameters["intra_op_thread_count"].string_value = str(profile.threads)
    config.parameters["ranked"].string_value = str(profile.ranked)
    config.parameters["overload_rows"].string_value = str(profile.overload_rows)
    return config


def _explain(
    s: contract.StageTensors, heads: tuple[contract.TaskHead, ...], profile: ServingProfile, exclude_seen: bool
) -> pb.ModelConfig:
    """The model that says why: one request of one row at a time, and few that wait, whatever the profile."""
    p = replace(profile, max_batch_size=1, preferred_batch=0, queue_delay_us=0, max_queue=MAX_EXPLAINS)
    config = _base(EXPLAIN, "python", p, EXPLAIN_INPUTS, EXPLAIN_OUTPUTS)
    _transforms(config, s, exclude_seen)
    told = {"heads": json.dumps([head.name for head in heads]), "ranked": str(p.ranked)}
    for key, value in {**told, "intra_op_thread_count": str(p.threads)}.items():
        config.parameters[key].string_value = value
    return config


def _shards(s: contract.StageTensors, profile: ServingProfile) -> dict[str, pb.ModelConfig]:
    """Configurations of the shards by model: graphs for ONNX Runtime, whatever runs the other stages."""
    p = profile if profile.backend == "onnxruntime" else replace(profile, backend="onnxruntime", kind="CPU")
    configs = {}
    for shard in range(s.shards):
        name, outputs = shard_model(shard), shard_outputs(s, shard)
        configs[name] = _graph(_base(name, p.backend, p, shard_inputs(s), outputs), p)
    return configs


def model_configs(
    s: contract.StageTensors, heads: tuple[contract.TaskHead, ...], profile: ServingProfile, exclude_seen: bool = True
) -> dict[str, pb.ModelConfig]:
    """Every model's Triton configuration, by model name."""
    p, s = profile, _served(s.reading(profile.history), profile)
    transform = _base(contract.FEATURE_TRANSFORM, "python", p, contract.REQUEST, contract.feature_transform_outputs(s))
    _transforms(transform, s, exclude_seen)
    retrieval = _base(
        contract.RETRIEVAL,
        _backend(contract.RETRIEVAL, s, p),
        p,
        contract.retrieval_stage_inputs(s),
        contract.retrieval_stage_outputs(s),
        p.retrieval_instances,
    )
    if s.lists_seen:
        retrieval.parameters["shapes"].string_value = json.dumps(asdict(s))
    # its inputs are the user's whole state: without a new event it hits, with one it misses. An answer that a shard is
    # missing of would stay
    if p.state_cache and not s.shards:
        retrieval.response_cache.enable = True
    ranking = _base(
        contract.RANKING,
        _backend(contract.RANKING, s, p),
        p,
        contract.ranking_stage_inputs(s),
        contract.ranking_outputs(s, heads),
        p.ranking_instances,
    )
    if s.fresh:
        ranking.default_model_filename = FRESH_ADAPTER.name
        _transforms(ranking, s, exclude_seen)
    response = _base(
        contract.RESPONSE, "python", p, contract.response_inputs(s, heads), contract.response_outputs(s, heads)
    )
    append = _base(contract.APPEND_EVENT, "python", p, contract.APPEND, contract.APPEND_OUTPUTS)
    update = _base(contract.UPDATE_STORE, "python", p, contract.UPDATE, contract.UPDATE_OUTPUTS)
    for config in (append, update):
        config.parameters["feature_store"].string_value = FEATURE_STORE
    append.parameters["minute_events"].string_value = str(s.minute_events)
    update.parameters["followed"].string_value = str(bool(s.fresh)).lower()
    for config in (append, response) if s.fresh else ():
        _transforms(config, s, exclude_seen)
    response.parameters["feature_store"].string_value = FEATURE_STORE
    search = {}
    if s.search:
        config = _base(contract.QUERY_SEARCH, "python", p, contract.query_search_inputs(s), (contract.FOUND,))
        _transforms(config, s, exclude_seen)
        search[contract.QUERY_SEARCH] = config
    return search | {
        contract.FEATURE_TRANSFORM: transform,
        **_shards(s, p),
        contract.RETRIEVAL: retrieval if s.lists_seen else _graph(retrieval, p),
        contract.RANKING: _graph(ranking, p),
        contract.RESPONSE: response,
        contract.APPEND_EVENT: append,
        contract.UPDATE_STORE: update,
        EXPLAIN: _explain(s, heads, p, exclude_seen),
        contract.ENSEMBLE: _fused(s, heads, p, exclude_seen) if p.fused else _ensemble(s, heads, p),
    }


def config_file(repository: Path, model: str, profile: str) -> Path:
    """The configuration that Triton takes for a model under a profile: the profile's own if there is one."""
    of_profile = repository / model / "configs" / f"{profile}.pbtxt"
    return of_profile if profile and of_profile.exists() else repository / model / "config.pbtxt"


def read_config(repository: Path, model: str, profile: str) -> pb.ModelConfig:
    """Raises ValueError for a profile that is not there."""
    check_profile(repository, profile)
    return text_format.Parse(config_file(repository, model, profile).read_text(), pb.ModelConfig())


def profiles(repository: Path) -> list[str]:
    """Names of the profiles that a repository has configurations for, beside "", which is ``config.pbtxt``."""
    return sorted({path.stem for path in repository.glob("*/configs/*.pbtxt")})


def check_profile(repository: Path, profile: str) -> None:
    """Raises ValueError that names the profiles there are where ``profile`` is none of them: Triton would serve
    ``config.pbtxt`` in its place and say nothing."""
    if profile and profile not in profiles(repository):
        raise ValueError(
            f"--profile: expected one of {', '.join([ENSEMBLE, *profiles(repository)])}, or no --profile, "
            f"got {profile!r} ({repository})"
        )


def models(repository: Path, profile: str) -> list[str]:
    """What a server loads under a profile: without an ensemble the stages stay where they are. Raises ValueError for a
    profile that is not there."""
    names: tuple[str, ...] = ALL_MODELS
    if read_config(repository, contract.ENSEMBLE, profile).platform != "ensemble":
        names = (*BESIDE, contract.ENSEMBLE)
    return [name for name in names if (repository / name).is_dir()]


def served_from(root: Path, profile: str) -> Path:
    """Folder of the run that a tuned profile serves; ``root`` itself for a profile that was not tuned. Raises
    ValueError for a tuned profile whose configurations went with the graphs they were tuned for."""
    path = Run(root).tuning / f"{profile}.json"
    if not profile or not path.exists():
        return root
    served = root / str(json.loads(path.read_text())["chosen"]["trial"]["engine"])
    if profile not in profiles(Run(served).repository):
        raise ValueError(
            f"--profile {profile}: tuned for graphs that were compiled anew since; run 'vivace tune --name {root.name} "
            f"--save-as {profile}' again, or serve one of {', '.join(profiles(Run(served).repository)) or 'none'}"
        )
    return served


def tuned_for(run: Run) -> list[str]:
    """Names of the profiles that ``vivace tune`` chose for the graphs of a run."""
    whole, names = run.whole.root, []
    for path in sorted(Run(whole).tuning.glob("*.json")):
        chosen = json.loads(path.read_text()).get("chosen")
        if chosen and (whole / str(chosen["trial"]["engine"])).resolve() == run.root.resolve():
            names.append(path.stem)
    return names


def render(config: pb.ModelConfig) -> str:
    """Text of one ``config.pbtxt``."""
    header = "# Rendered from vivace/contract.py by serving/repository.py; do not edit by hand.\n"
    return header + text_format.MessageToString(config)


def write_profile(
    folder: Path,
    s: contract.StageTensors,
    heads: tuple[contract.TaskHead, ...],
    profile_name: str,
    profile: ServingProfile,
    exclude_seen: bool = True,
    metadata: dict[str, str] | None = None,
) -> None:
    """One profile's configuration of every model under ``folder``; see ``write_configs``."""
    for name, config in model_configs(s, heads, profile, exclude_seen).items():
        for key, value in (metadata or {}).items() if name == contract.ENSEMBLE else ():
            config.parameters[key].string_value = value
        path = folder / name / (f"configs/{profile_name}.pbtxt" if profile_name else "config.pbtxt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(config))


def write_configs(
    folder: Path,
    s: contract.StageTensors,
    heads: tuple[contract.TaskHead, ...],
    exclude_seen: bool = True,
    metadata: dict[str, str] | None = None,
) -> None:
    """``config.pbtxt`` and ``configs/<profile>.pbtxt`` of every model under ``folder``. ``metadata``: parameters of the
    ensemble that say what is served; any client reads them with the model's configuration."""
    for old in folder.glob("*/configs/*.pbtxt"):  # tuned ones are for the graphs that were there
        old.unlink()
    for name, profile in PROFILES.items():
        write_profile(folder, s, heads, name, profile, exclude_seen, metadata)


def assemble(
    repository: Path,
    s: contract.StageTensors,
    heads: tuple[contract.TaskHead, ...],
    files: dict[str, dict[str, Path]],
    exclude_seen: bool = True,
    metadata: dict[str, str] | None = None,
) -> int:
    """Publishes compiled files as a new version of ``repository``, all models at once (see ``serving.releases``).

    ``files[model][name]`` becomes ``<model>/<version>/<name>``. Returns the version.
    """
    with publishing(repository) as (release, version):
        write_configs(release, s, heads, exclude_seen, metadata)
        for model in (*ALL_MODELS, *map(shard_model, range(s.shards))):
            if model == contract.QUERY_SEARCH and not s.search:
                continue
            target = release / model / str(version)
            target.mkdir(parents=True)
            adapter = CHECKOUT_REPOSITORY / model / "1" / "model.py"
            if model == contract.RETRIEVAL and s.lists_seen:
                adapter = SHARDS_ADAPTER if s.shards else INDEX_ADAPTER
            if model == contract.QUERY_SEARCH:
                adapter = SEARCH_ADAPTER
            if model == contract.RANKING and s.fresh:
                shutil.copy(FRESH_ADAPTER, target)
            if adapter.exists():
                shutil.copy(adapter, target / "model.py")
            for name, path in files.get(model, {}).items():
                shutil.copy(path, target / name)
    return version


if __name__ == "__main__":  # python -m serving.repository: renders the checkout's configurations anew
    write_configs(CHECKOUT_REPOSITORY, DEFAULT_SHAPES, DEFAULT_HEADS)
