"""``vivace serve``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, MAX_PORT, Artifacts, Host, Name, Profile, say
from vivace.cli.runs import find_run, say_next
from vivace.cli.values import choice, percent, plain_name
from vivace.run import Run
from vivace.store.opening import STORE_URL

SELF_SIGNED = ("self-signed",)

PortOption = Annotated[int, typer.Option(help="0: any free port", min=0, max=MAX_PORT)]
StatusPortOption = Annotated[
    int, typer.Option(help="Prometheus metrics of the watchdog (0: none)", min=0, max=MAX_PORT)
]
CacheMbOption = Annotated[int, typer.Option(help="cache of encoded users (0: none); takes the profile cached", min=0)]
StateCacheMbOption = Annotated[
    int,
    typer.Option(help="cache of histories' states, of all workers (0: none); takes the profile fused", min=0),
]
AnswerCacheMbOption = Annotated[
    int, typer.Option(help="cache of whole answers (0: none); takes the profile fused", min=0)
]
AnswerCacheSOption = Annotated[
    float, typer.Option(help="an answer is kept for at most so many seconds", min=1, max=86_400)
]
TraceUrlOption = Annotated[str, typer.Option(help="OpenTelemetry collector, such as http://127.0.0.1:4318/v1/traces")]
TraceRateOption = Annotated[int, typer.Option(help="one of so many requests is traced", min=1)]
LogFileOption = Annotated[
    Path | None, typer.Option(help="Triton's log; default artifacts/RUN/triton.log", dir_okay=False)
]
VerboseOption = Annotated[int, typer.Option(help="of Triton's log", min=0)]
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        envvar=STORE_URL,
        metavar="URL",
        show_default=False,
        help="a Valkey that servers share, such as valkey://127.0.0.1:6379/0; without it the run's own store",
    ),
]
ReplicasOption = Annotated[
    int,
    typer.Option(
        help="servers behind the one guard: one that dies leaves the others; each takes its memory", min=1, max=16
    ),
]
ShardOption = Annotated[
    int | None,
    typer.Option(help="serve this shard of retrieval alone, from 0, for servers elsewhere that ask it by HTTP", min=0),
]
ShardHostsOption = Annotated[
    str,
    typer.Option(
        metavar="HOSTS",
        show_default=False,
        help="where the shards are, such as a:8000|b:8000,c:8000 for two, the first with a twin; else they start here",
    ),
]
ShardTwinsOption = Annotated[
    int, typer.Option(help="servers of each shard that is started: one that is slow or dead has another", min=1, max=4)
]
ShardWaitOption = Annotated[
    int, typer.Option(help="a shard that has not answered by then is done without", min=1, max=10_000)
]
ShardCertOption = Annotated[
    Path | None, typer.Option(help="PEM, with its key: shown to --shard-hosts, which ask for one", dir_okay=False)
]
ShardCaOption = Annotated[
    Path | None, typer.Option(help="PEM: the authority by which --shard-hosts are known", dir_okay=False)
]
ImpressionsOption = Annotated[
    bool, typer.Option("--impressions", help="log what is shown to whom in artifacts/RUN/impressions")
]
ImpressionsEveryOption = Annotated[
    float,
    typer.Option(help="seconds between two files of --impressions; a killed process loses as much", min=1),
]
ExploreOption = Annotated[
    Any, typer.Option(parser=percent, metavar="PERCENT", help="of the places show new items; needs --impressions")
]
ParityOption = Annotated[
    Any, typer.Option(parser=percent, metavar="PERCENT", help="of the requests kept for 'vivace parity'")
]
SuspectsOption = Annotated[
    str,
    choice("--suspects", ("keep", "refuse"), "what becomes of events that no person sends; kept, they count for none"),
]
VariantOption = Annotated[
    str, typer.Option(help="what --impressions calls this server's arm of an experiment", parser=plain_name)
]
GuardOption = Annotated[
    bool,
    typer.Option("--guard/--no-guard", help="Envoy in front; without it only on a loopback address"),
]
KeysOption = Annotated[
    Path | None, typer.Option(help="callers need one of these; 'vivace keys add' makes the file", dir_okay=False)
]
TlsOption = Annotated[str, choice("--tls", SELF_SIGNED, "certificate for trials, kept in the run's folder")]
TlsCertOption = Annotated[Path | None, typer.Option(help="PEM, with its chain; needs --tls-key", dir_okay=False)]
TlsKeyOption = Annotated[Path | None, typer.Option(help="PEM, of --tls-cert", dir_okay=False)]
ClientCaOption = Annotated[
    Path | None, typer.Option(help="PEM; callers need a certificate that it signed", dir_okay=False)
]
InsecureNetworkOption = Annotated[
    bool, typer.Option("--insecure-network", help="serve others without keys or TLS: only on a trusted network")
]


def serve(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    host: Host = "127.0.0.1",
    http_port: PortOption = 8000,
    grpc_port: PortOption = 8001,
    metrics_port: PortOption = 8002,
    status_port: StatusPortOption = 8003,
    profile: Profile = "",
    cache_mb: CacheMbOption = 0,
    answer_cache_mb: AnswerCacheMbOption = 0,
    answer_cache_s: AnswerCacheSOption = 60.0,
    state_cache_mb: StateCacheMbOption = 0,
    trace_url: TraceUrlOption = "",
    trace_rate: TraceRateOption = 100,
    log_file: LogFileOption = None,
    verbose: VerboseOption = 0,
    store: StoreOption = "",
    replicas: ReplicasOption = 1,
    shard: ShardOption = None,
    shard_hosts: ShardHostsOption = "",
    shard_twins: ShardTwinsOption = 1,
    shard_wait_ms: ShardWaitOption = 300,
    shard_cert: ShardCertOption = None,
    shard_ca: ShardCaOption = None,
    impressions: ImpressionsOption = False,
    impressions_every: ImpressionsEveryOption = 60.0,
    explore: ExploreOption = "0",
    parity: ParityOption = "0",
    variant: VariantOption = "",
    suspects: SuspectsOption = "keep",
    guard: GuardOption = True,
    keys: KeysOption = None,
    tls: TlsOption = "",
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    client_ca: ClientCaOption = None,
    insecure_network: InsecureNetworkOption = False,
) -> None:
    """Start the real Triton with a compiled run, guard it, bring back what ends, stop cleanly on Ctrl-C."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # its handlers may end a server that is about to start
    from serving.door.options import AccessOptions
    from serving.server_options import ServerOptions
    from serving.service import run_until_signal

    run = find_run(artifacts, name)
    profile = _profile(run, profile or ("cached" if cache_mb else "fused" if answer_cache_mb or state_cache_mb else ""))
    served = _served(run, profile)
    if tls:
        tls_cert, tls_key = _certificate_for_trials(run.root / "tls", host, (tls_cert, tls_key))
    options = ServerOptions(
        repository=served.repository,
        **dict(host=host, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port),  # type: ignore[arg-type]
        profile=profile,
        **_caches(cache_mb, answer_cache_mb, answer_cache_s, state_cache_mb),
        trace_url=trace_url,
        trace_rate=trace_rate,
        log=log_file or _log_of(run, shard),
        verbose=verbose,
        **dict(impressions=impressions, impressions_every_s=impressions_every),  # type: ignore[arg-type]
        **dict(explore=explore, parity=parity, variant=variant, suspects=suspects),  # type: ignore[arg-type]
        guard=guard and (shard is None or tls_cert is not None),
        store=store,
        restricted=True,
        access=AccessOptions(
            keys=keys, certificate=tls_cert, private_key=tls_key, client_ca=client_ca, insecure_network=insecure_network
        ),
        shard=shard,
        shards=shard_hosts,
        shard_twins=shard_twins,
        shard_wait_ms=shard_wait_ms,
        shard_cert=shard_cert,
        shard_ca=shard_ca,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    query = (lambda: say_next(_query_of(options), run, artifacts)) if shard is None else None
    run_until_signal(options, status_port, say, query, replicas)


def _profile(run: Run, asked: str) -> str:
    """The profile of a repository for what ``asked``; where that is nothing, the one for this machine, and says so."""
    from serving.default_profile import default_profile, named_profile

    if asked:
        return named_profile(asked)
    profile, why = default_profile(run.repository)
    if why:
        say(why)
    return profile


def _served(run: Run, profile: str) -> Run:
    """The run whose repository the profile serves."""
    from serving.repository import served_from

    served = Run(served_from(run.root, profile))
    if served != run:
        say(f"profile {profile} serves {served.root}")
    if doubt := served.doubt():
        say(f"serving what was published before: {doubt}")
    return served


def _log_of(run: Run, shard: int | None) -> Path:
    """Each process has its own, which it cuts off when it grows."""
    return run.server_log if shard is None else run.server_log.with_name(f"triton-only-shard-{shard}.log")


def _query_of(options: Any) -> str:
    """The command that asks a server with these options, a ``ServerOptions``."""
    address = "" if options.grpc_port in (0, 8001) else f" --url 127.0.0.1:{options.grpc_port}"
    access = options.access
    trust = f" --tls-ca {access.certificate}" if access.certificate else ""
    return f"query{address}{trust}" + (" --key KEY" if access.keys else "")


def _caches(users_mb: int, answers_mb: int, answers_s: float, states_mb: int) -> dict[str, Any]:
    """Options of a server: the caches of encoded users, of answers and of states."""
    from serving.runtime.cache_settings import CacheSettings, StateSettings

    answers = CacheSettings(answers_mb << 20, answers_s) if answers_mb else None
    states = StateSettings(states_mb << 20) if states_mb else None
    return {"cache_bytes": users_mb << 20, "answer_cache": answers, "state_cache": states}


def _certificate_for_trials(folder: Path, host: str, given: tuple[Path | None, Path | None]) -> tuple[Path, Path]:
    """(certificate, key), made where there is none. ``given``: by options, which do not go with it."""
    if any(given):
        raise typer.BadParameter("goes without --tls-cert and --tls-key", param_hint="--tls")
    from serving.door.tls import self_signed
    from serving.start_checks import local_address

    certificate, key, made = self_signed(folder, local_address(host))
    say(f"certificate for trials, which callers trust by --tls-ca {certificate}: SHA-256 {made.fingerprint}")
    return certificate, key
