"""Envoy's configuration, rendered from what the door lets through.

Only the public models' paths exist; a body has a bounded length and arrives at Triton in one piece with its length;
what a route cannot see is checked by ``checks.lua``. A call of ``recommend`` that the server's death cut off is sent
again until the server is back; a call of ``append_event`` is not, as it may have been stored.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.door.endpoints import GRPC, METRICS, OTHERS, RECOMMEND, endpoints_file, pipe
from serving.door.statistics import stats_config
from vivace import contract

FOLDER = Path(__file__).parent
PUBLIC = (contract.ENSEMBLE, contract.APPEND_EVENT, contract.UPDATE_STORE)
SERVICE = "/inference.GRPCInferenceService"
GRPC_READS = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig")
TYPE = "type.googleapis.com/envoy.extensions.filters"
INSPECTOR = f"{TYPE}.listener.http_inspector.v3.HttpInspector"
MONITORS = "type.googleapis.com/envoy.extensions.resource_monitors"
BRIDGE = "envoy.filters.http.grpc_http1_reverse_bridge"
UNREADY, STOPPING = "vivace.unready", "vivace.stopping"  # runtime keys, in per cent of the calls
IN_FLIGHT = r"cluster\..*\.upstream_rq_(pending_)?active"
HCM = f"{TYPE}.network.http_connection_manager.v3.HttpConnectionManager"


@dataclass(frozen=True, kw_only=True)
class DoorOptions:
    """What the door listens on and lets through."""

    host: str
    """Address of the three public ports."""
    http_port: int
    grpc_port: int
    metrics_port: int
    threads: int = 2
    """Workers of Envoy; each adds a copy of its buffers."""
    max_body_bytes: int = 8 << 20
    """Longest request body; a longer one is answered 413."""
    max_header_kib: int = 7
    """All headers of a request together; Triton drops the connection at 8."""
    max_connections: int = 4096
    """Open connections of all clients of one port that have said something; three times as many with those that have
    not."""
    silent_s: float = 10.0
    """A connection on which nothing came is closed after so long; until then it takes nobody's place."""
    idle_s: float = 60.0
    """A connection without a request is closed after so long."""
    max_recommends: int = 208
    """Calls of ``recommend`` at Triton; more are answered 503 at once. Triton's HTTP side hands an answer to the thread
    that sends it through a socket and forgets it where that is full, which it is with 278: of all calls together there
    must be fewer, as one thread may have them all."""
    max_others: int = 48
    """The same of all other calls, which a storm of those does not keep out."""
    slow_client_s: float = 15.0
    """A request that has not arrived whole by then is dropped."""
    timeout_s: float = 60.0
    """An answer that has not come by then is given up."""
    recovery_s: float = 8.0
    """How long a call of ``recommend`` is sent again while the server comes back."""


def _cluster(name: str, folder: Path, options: DoorOptions, most: int, http2: bool = False) -> dict[str, Any]:
    """Of the endpoints in its file under ``folder``. ``most``: calls at once."""
    source = {"resource_api_version": "V3", "path_config_source": {"path": str(endpoints_file(folder, name))}}
    cluster: dict[str, Any] = {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": source},
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},  # who is asked, ``write_endpoints`` says
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": options.max_connections,
                    "max_pending_requests": most,
                    "max_requests": most,
                    "max_retries": options.max_connections,
                }
            ]
        },
    }
    explicit = {"http2_protocol_options": {"max_concurrent_streams": 2048}} if http2 else {"http_protocol_options": {}}
    protocol = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": explicit,
        "common_http_protocol_options": {"idle_timeout": f"{options.idle_s:g}s"},  # what a burst took is given back
    }
    cluster["typed_extension_protocol_options"] = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol}
    return cluster


def _retry(options: DoorOptions) -> dict[str, Any]:
    """For calls that may be sent twice: while the server is away there is nobody to connect to."""
    return {
        "retry_on": "connect-failure,refused-stream,reset",
        "num_retries": int(options.recovery_s / 0.12),  # waits are drawn from 0 to the interval
        "retry_back_off": {"base_interval": "0.1s", "max_interval": "0.25s"},
    }


def _to(cluster: str, options: DoorOptions, again: bool = False) -> dict[str, Any]:
    route: dict[str, Any] = {"cluster": cluster, "timeout": f"{options.timeout_s:g}s"}
    return route | ({"retry_policy": _retry(options)} if again else {})


def _infer(model: str, options: DoorOptions) -> dict[str, Any]:
    ranks = model == contract.ENSEMBLE
    return _to(RECOMMEND if ranks else OTHERS, options, again=ranks)


def _away(key: str, match: dict[str, Any], **more: Any) -> dict[str, Any]:
    """503 while ``key`` is set: what the supervisor knows and Triton does not."""
    chosen = {"default_value": {"numerator": 100 if key == UNREADY else 0}, "runtime_key": key}
    return {"match": match | {"runtime_fraction": chosen}, "direct_response": {"status": 503}} | more


def _method(name: str) -> list[dict[str, Any]]:
    return [{"name": ":method", "string_match": {"exact": name}}]


def _refused_pages(options: DoorOptions) -> list[dict[str, Any]]:
    """Whatever a web page in someone's browser sends: a page of anywhere may post text to a port of its reader's own
    machine. Browsers name its origin, no other client does. On loopback a domain in Host is refused too, as a name that
    its owner points here makes the page one of the same origin."""
    origins = ("cross-site", "same-site", "same-origin")
    signs: list[dict[str, Any]] = [
        {"name": "origin", "present_match": True},
        {"name": "sec-fetch-site", "string_match": {"safe_regex": {"regex": "|".join(origins)}}},
    ]
    if ipaddress.ip_address(socket.gethostbyname(options.host)).is_loopback:
        domain = r"([^:\[]*\.)+[A-Za-z][^:.]*\.?(:.*)?"
        signs.append({"name": ":authority", "string_match": {"safe_regex": {"regex": domain}}})
    text = "no call of a web page is taken, nor one for a domain on a loopback address; ask from a program"
    refusal = {"status": 403, "body": {"inline_string": text}}
    return [{"match": {"prefix": "/", "headers": [sign]}, "direct_response": refusal} for sign in signs]


def _http_routes(options: DoorOptions) -> list[dict[str, Any]]:
    probes = f"/v2/health/ready|/v2/models/({'|'.join(PUBLIC)})(/versions/[0-9]{{1,9}})?/ready"
    routes: list[dict[str, Any]] = [
        _away(STOPPING, {"prefix": "/v2/models/", "headers": _method("POST")}),
        _away(UNREADY, {"safe_regex": {"regex": probes}, "headers": _method("GET")}),
    ]
    routes += [
        {"match": {"path": path, "headers": _method("GET")}, "route": _to(OTHERS, options, again=True)}
        for path in ("/v2", "/v2/health/live", "/v2/health/ready")
    ]
    for model in PUBLIC:
        base = f"/v2/models/{model}(/versions/[0-9]{{1,9}})?"
        infer = {"safe_regex": {"regex": f"{base}/infer"}, "headers": _method("POST")}
        routes.append({"match": infer, "route": _infer(model, options), "stat_prefix": model})
        config = "|/config" if model == contract.ENSEMBLE else ""  # those of the others name the store
        look = {"safe_regex": {"regex": f"{base}(/ready{config})?"}, "headers": _method("GET")}
        routes.append({"match": look, "route": _to(OTHERS, options, again=True)})
    return [*_refused_pages(options), *routes, _nothing()]


def _model(name: str) -> list[dict[str, Any]]:
    return [{"name": "x-vivace-model", "string_match": {"exact": name}}]


def _nothing() -> dict[str, Any]:
    text = f"no such path; the public calls are POST /v2/models/MODEL/infer of {', '.join(PUBLIC)}"
    return {"match": {"prefix": "/"}, "direct_response": {"status": 404, "body": {"inline_string": text}}}


def _grpc_routes(options: DoorOptions) -> list[dict[str, Any]]:
    plain = ["grpc-timeout"]  # the client's own timer cuts its wait; Triton 2.51 dies of deadlines it sees
    no_bridge = {"@type": f"{TYPE}.http.grpc_http1_reverse_bridge.v3.FilterConfigPerRoute", "disabled": True}
    readiness = f"{SERVICE}/(ServerReady|ModelReady)"
    away = [
        *(_away(STOPPING, {"prefix": "/", "headers": _model(model)}) for model in PUBLIC),
        _away(UNREADY, {"safe_regex": {"regex": readiness}}, typed_per_filter_config={BRIDGE: no_bridge}),
    ]
    routes: list[dict[str, Any]] = [  # by the model that the checks read in the message; a caller's own header is gone
        {"match": {"prefix": "/", "headers": _model(model)}, "route": _infer(model, options), "stat_prefix": model}
        for model in PUBLIC
    ]
    routes += [
        {"match": {"path": f"{SERVICE}/ModelInfer"}, "route": _to(OTHERS, options)},
        *(
            {
                "match": {"path": f"{SERVICE}/{call}"},
                "route": _to(GRPC, options, again=True),
                "typed_per_filter_config": {BRIDGE: no_bridge},
            }
            for call in GRPC_READS
        ),
    ]
    for route in routes:
        route["request_headers_to_remove"] = plain
    return [*away, *routes, _nothing() | {"typed_per_filter_config": {BRIDGE: no_bridge}}]


def _lua(name: str, files: tuple[str, ...], request: str = "", response: str = "") -> dict[str, Any]:
    """A Lua filter of ``files`` whose functions ``request`` and ``response`` see each call."""
    calls = [
        f"function envoy_on_{side}(handle) {f}(handle) end"
        for side, f in (("request", request), ("response", response))
        if f
    ]
    code = "\n".join([*(f"{(FOLDER / file).read_text()}" for file in files), *calls])
    return {
        "name": name,
        "typed_config": {"@type": f"{TYPE}.http.lua.v3.Lua", "default_source_code": {"inline_string": code}},
    }


def _http_checks() -> list[dict[str, Any]]:
    return [_lua("checks", ("json.lua", "checks.lua"), "guard_http", "blame_caller")]


def _grpc_checks() -> list[dict[str, Any]]:
    bridge = {
        "@type": f"{TYPE}.http.grpc_http1_reverse_bridge.v3.FilterConfig",
        "content_type": "application/x-protobuf",
        "withhold_grpc_frames": True,
    }
    return [
        _lua("checks", ("json.lua", "transcode.lua", "checks.lua"), "guard_grpc", "end_grpc"),
        {"name": BRIDGE, "typed_config": bridge},
        _lua("transcode", ("json.lua", "transcode.lua"), response="from_http"),
    ]


def _replies(options: DoorOptions, grpc: bool) -> dict[str, Any]:
    """How the door words what it refuses itself: {"error": ...} over HTTP, the status message over gRPC."""
    words = {
        400: ("", "3"),  # the checks' own reasons
        408: (f"request: not whole after {options.slow_client_s:g} s; send it faster", "4"),
        413: (f"body: expected at most {options.max_body_bytes} bytes; send fewer rows or shorter histories", "8"),
        503: ("server: not there just now, or more requests than it takes; try again", "14"),
        504: (f"server: no answer in {options.timeout_s:g} s; try again", "14"),
    }
    mappers = []
    for status, (text, code) in words.items():
        equal = {"value": {"default_value": status, "runtime_key": f"vivace.{status}"}, "op": "EQ"}
        mapper: dict[str, Any] = {"filter": {"status_code_filter": {"comparison": equal}}}
        if text:
            mapper["body"] = {"inline_string": text}
        if grpc and text:
            header = {"key": "grpc-status", "value": code}
            mapper["headers_to_add"] = [{"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]
        mappers.append(mapper)
    plain = {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}}
    return {
        "mappers": mappers,
        "body_format": plain if grpc else {"json_format": {"error": "%LOCAL_REPLY_BODY%"}},
    }


def _listener(
    name: str,
    options: DoorOptions,
    port: int,
    routes: list[dict[str, Any]],
    checks: list[dict[str, Any]],
    http2: bool = False,
) -> dict[str, Any]:
    limit = {"@type": f"{TYPE}.http.buffer.v3.Buffer", "max_request_bytes": options.max_body_bytes}
    router = {"@type": f"{TYPE}.http.router.v3.Router", "suppress_envoy_headers": True}
    manager = {
        "@type": HCM,
        "stat_prefix": name,
        "codec_type": "HTTP2" if http2 else "AUTO",
        "route_config": {"name": name, "virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]},
        "http_filters": [
            {"name": "envoy.filters.http.buffer", "typed_config": limit},
            *checks,
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
        "generate_request_id": False,
        "server_name": "vivace",
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD",
        "max_request_headers_kb": options.max_header_kib,
        "request_headers_timeout": f"{options.slow_client_s:g}s",
        "request_timeout": f"{options.slow_client_s:g}s",
        "stream_idle_timeout": f"{options.timeout_s:g}s",
        "common_http_protocol_options": {"idle_timeout": f"{options.idle_s:g}s", "max_headers_count": 64},
        "http2_protocol_options": {
            "max_concurrent_streams": 1024,
            "initial_stream_window_size": 1 << 20,
            "initial_connection_window_size": 4 << 20,
        },
        "local_reply_config": _replies(options, http2),
    }
    most = {
        "@type": f"{TYPE}.network.connection_limit.v3.ConnectionLimit",
        "stat_prefix": name,
        "max_connections": options.max_connections,
    }
    return {
        "name": name,
        "address": {"socket_address": {"address": options.host, "port_value": port}},
        "listener_filters": [{"name": "envoy.filters.listener.http_inspector", "typed_config": {"@type": INSPECTOR}}],
        "listener_filters_timeout": f"{options.silent_s:g}s",
        "enable_reuse_port": False,  # two doors on one port would share its callers
        "per_connection_buffer_limit_bytes": options.max_body_bytes + (1 << 16),
        "filter_chains": [
            {
                "filters": [
                    {"name": "envoy.filters.network.connection_limit", "typed_config": most},
                    {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager},
                ]
            }
        ],
    }


def admin_socket(folder: Path) -> Path:
    return folder / "envoy-admin"


def render(options: DoorOptions, folder: Path) -> str:
    """The bootstrap as JSON, of a door whose files lie in ``folder``."""
    metrics = [
        *_refused_pages(options),
        {"match": {"path": "/metrics", "headers": _method("GET")}, "route": _to(METRICS, options)},
        _nothing(),
    ]
    config = {
        "node": {"id": "door", "cluster": "vivace"},
        "admin": {"address": pipe(admin_socket(folder))},
        "static_resources": {
            "listeners": [
                _listener("http", options, options.http_port, _http_routes(options), _http_checks()),
                _listener("grpc", options, options.grpc_port, _grpc_routes(options), _grpc_checks(), http2=True),
                _listener("metrics", options, options.metrics_port, metrics, []),
            ],
            "clusters": [
                _cluster(RECOMMEND, folder, options, options.max_recommends),
                _cluster(OTHERS, folder, options, options.max_others),
                _cluster(GRPC, folder, options, options.max_others, http2=True),
                _cluster(METRICS, folder, options, options.max_others),
            ],
        },
        "memory_allocator_manager": {"bytes_to_release": 64 << 20, "memory_release_interval": "1s"},
        "stats_config": stats_config(IN_FLIGHT),
        "layered_runtime": {
            # a caller that gives up most of its calls after milliseconds is no attacker: Triton does not see it
            "layers": [
                {"name": "static", "static_layer": {"overload.premature_reset_total_stream_count": 100_000}},
                {"name": "admin", "admin_layer": {}},
            ]
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{MONITORS}.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": 3 * options.max_connections,
                    },
                }
            ]
        },
    }
    return json.dumps(config, indent=1)
