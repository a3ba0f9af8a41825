"""How a server is started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from serving.door.options import AccessOptions
from serving.process import server_environment
from serving.runtime.answer_samples import ENVIRONMENT as ANSWERS, Listener
from serving.runtime.cache_settings import ANSWER_CACHE, STATE_CACHE, CacheSettings, StateSettings
from serving.runtime.events import KEEP, SUSPECTS
from serving.runtime.explore import ENVIRONMENT as EXPLORE
from serving.runtime.interleaved import ENVIRONMENT as INTERLEAVE, Interleave
from serving.runtime.rules import ENVIRONMENT as RULES
from serving.segments import Segments
from serving.shard_addresses import CA_ENV, CERT_ENV, SHARDS_ENV, WAIT_ENV, WAIT_MS
from serving.wheel import python_library, wheel_folder
from vivace.contract import TRIAL
from vivace.impressions.queue import ENVIRONMENT, ImpressionOptions, folder_of
from vivace.impressions.samples import ENVIRONMENT as PARITY, SampleOptions, folder_of as samples_of
from vivace.store.opening import STORE_URL
from vivace.store.retention import Retention


@dataclass(frozen=True)
class ServerOptions:
    """How to start. Port 0 takes a free one. ``cache_bytes`` sizes Triton's local response cache (0: none).
    ``trace_url``: an OpenTelemetry collector (OTLP over HTTP) that gets one of ``trace_rate`` requests. ``guard``: the
    ports are Envoy's, which lets the public calls through and nothing else, and Triton listens on Unix sockets that
    only this user opens; without it Triton's own ports are on ``host``, its management calls behind a key
    (``restricted``)."""

    repository: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    profile: str = ""
    cache_bytes: int = 0
    answer_cache: CacheSettings | None = None  # of whole answers; None: none
    state_cache: StateSettings | None = None  # of what was worked out of histories; None: none
    trace_url: str = ""
    trace_rate: int = 100
    log: Path | None = None
    verbose: int = 0
    start_timeout_s: float = 120.0
    python: Path = Path(sys.executable)  # that of the Python workers
    extra: tuple[str, ...] = field(default=())
    guard: bool = False
    restricted: bool = False
    impressions: bool = False  # what is shown is logged in the run's folder
    impressions_every_s: float = 60.0  # and written as often: so much of it goes with a process that is killed
    parity: float = 0.0  # share of requests that are put aside to be computed again (``serving.runtime.sampling``)
    explore: float = 0.0  # share of places that show new items (``serving.runtime.explore``)
    variant: str = ""  # what the log calls this server's arm of an experiment
    store: str = field(default="", repr=False)  # URL of a shared store; "": the run's own folder
    access: AccessOptions = field(default=AccessOptions())  # of the guard
    shard: int | None = None  # this server is that shard of retrieval and nothing else
    shards: str = ""  # where the shards are (``serving.shard_addresses``); "": started beside it, where there are any
    shard_twins: int = 1  # servers of each shard that is started
    answers: Path | None = None  # socket that samples of its answers go to, while anyone listens
    shard_wait_ms: int = WAIT_MS  # what has not come from a shard by then is done without
    shard_cert: Path | None = None  # shown to shards elsewhere: PEM, with its key; None: they are asked in the clear
    shard_ca: Path | None = None  # PEM: the authority that they are known by
    suspects: str = KEEP  # what becomes of events that no person sends
    rules: Path | None = None  # the business rules that were accepted; None: the run's file as it is
    interleave: Interleave | None = None  # the version that its answers are drafted with


def with_files(options: ServerOptions, segments: Segments) -> ServerOptions:
    """The same with its caches in files among ``segments``, those that have none yet."""
    answers, states = options.answer_cache, options.state_cache
    return replace(options, answer_cache=answers and answers.at(segments), state_cache=states and states.at(segments))


def environment(options: ServerOptions, release: Path) -> dict[str, str]:
    """Triton's Python workers ignore PYTHONPATH (they start Python isolated): they find this environment, with the
    project installed in it, because its ``python3`` is the first on PATH."""
    env = dict(os.environ)
    binaries = str(options.python.parent)
    libraries = [str(wheel_folder().parent / "nvidia_pytriton.libs"), str(python_library().parent)]
    env["PATH"] = os.pathsep.join([binaries, env.get("PATH", "")])
    env.pop(STORE_URL, None)
    env |= log_environment(options, release)
    if options.store:  # not by the command line, which every user of the machine can read
        env[STORE_URL] = options.store
    env[ANSWER_CACHE] = "" if options.answer_cache is None else options.answer_cache.text()
    env[STATE_CACHE] = "" if options.state_cache is None else options.state_cache.text()
    answers = options.answers
    env[ANSWERS] = "" if answers is None else Listener(str(answers), options.variant == TRIAL).to_json()
    env[INTERLEAVE] = "" if options.interleave is None else options.interleave.to_json()
    env[RULES] = str(options.rules or "")
    env[SUSPECTS] = options.suspects
    env[EXPLORE] = f"{options.explore:g}" if options.explore else ""
    if options.shards:
        env |= {SHARDS_ENV: options.shards, WAIT_ENV: str(options.shard_wait_ms)}
    env |= shard_environment(options)
    env["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
    return server_environment(env)


def shard_environment(options: ServerOptions) -> dict[str, str]:
    """What ``serving.shard_addresses.credentials_from`` reads."""
    return {CERT_ENV: str(options.shard_cert or ""), CA_ENV: str(options.shard_ca or "")}


def log_environment(options: ServerOptions, release: Path) -> dict[str, str]:
    """What tells the workers of ``release`` how to log what they show ("": they do not): beside the run's store, and
    kept as long as its events. Raises ValueError for values that are none."""
    if not options.impressions:
        return {ENVIRONMENT: "", PARITY: ""}
    store = release.parent / "feature_store"
    days, every_s = Retention.of(store).days, options.impressions_every_s
    log = ImpressionOptions(folder=str(folder_of(store)), variant=options.variant, days=days, seconds=every_s)
    samples = SampleOptions(str(samples_of(folder_of(store))), options.parity, every_s)
    return {ENVIRONMENT: log.to_json(), PARITY: samples.to_json() if options.parity else ""}
