"""The door's ports: how long it waits for a caller, what it checks before a call may go on, how it words a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving.door.extension import changing
from serving.door.options import DoorFiles, DoorOptions
from serving.door.rollout import HEADER_MUTATION
from serving.door.routes import BRIDGE, TYPE, grpc_routes, http_routes, metrics_routes
from vivace import contract

FOLDER = Path(__file__).parent
INSPECTORS = {  # what a connection says first; until then it takes nobody's place
    "http": f"{TYPE}.listener.http_inspector.v3.HttpInspector",
    "tls": f"{TYPE}.listener.tls_inspector.v3.TlsInspector",
}
DOWNSTREAM_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
OWN_HEADERS = ["authorization", "x-vivace-key", "x-vivace-access"]  # of a caller with a key; not for Triton
TRIAL_HEADERS = ["x-vivace-rollout", "x-vivace-variant"]
TRIAL_FILES = ("sha256.lua", "trial.lua")
HCM = f"{TYPE}.network.http_connection_manager.v3.HttpConnectionManager"


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


def _http_checks(options: DoorOptions) -> list[dict[str, Any]]:
    files = ("json.lua", *TRIAL_FILES, *_by_user(options), "checks.lua")
    return [_lua("checks", files, "guard_http", "blame_caller")]


def _by_user(options: DoorOptions) -> tuple[str, ...]:
    return ("by_user.lua",) if options.by_user else ()


def _grpc_checks(options: DoorOptions) -> list[dict[str, Any]]:
    files = ("json.lua", "transcode.lua", *TRIAL_FILES, *_by_user(options), "checks.lua")
    bridge = {
        "@type": f"{TYPE}.http.grpc_http1_reverse_bridge.v3.FilterConfig",
        "content_type": "application/x-protobuf",
        "withhold_grpc_frames": True,
    }
    return [
        _lua("checks", files, "guard_grpc", "end_grpc"),
        {"name": BRIDGE, "typed_config": bridge},
        _lua("transcode", ("json.lua", "transcode.lua"), response="from_http"),
    ]


def _replies(options: DoorOptions, grpc: bool) -> dict[str, Any]:
    """How the door words what it refuses itself: {"error": ...} over HTTP, the status message over gRPC."""
    words = {
        400: ("", ""),  # the checks' own reasons and codes
        408: (f"request: not whole after {options.slow_client_s:g} s; send it faster", "4"),
        403: ("", "7"),
        413: (f"body: expected at most {options.max_body_bytes} bytes; send fewer rows or shorter histories", "8"),
        429: ("key: more calls a second than it has; send fewer, or ask for a higher rate", "8"),
        503: ("server: not there just now, or more requests than it takes; try again", "14"),
        504: ("server: no answer in time; try again, an event under the same event_id", "14"),
    }
    mappers = []
    for status, (text, code) in words.items():
        equal = {"value": {"default_value": status, "runtime_key": f"vivace.{status}"}, "op": "EQ"}
        mapper: dict[str, Any] = {"filter": {"status_code_filter": {"comparison": equal}}}
        if text:
            mapper["body"] = {"inline_string": text}
        if grpc and code:
            header = {"key": "grpc-status", "value": code}
            mapper["headers_to_add"] = [{"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]
        mappers.append(mapper)
    plain = {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}}
    return {
        "mappers": mappers,
        "body_format": plain if grpc else {"json_format": {"error": "%LOCAL_REPLY_BODY%"}},
    }


def _access_filters(options: DoorOptions, files: DoorFiles) -> list[dict[str, Any]]:
    """Who calls, and how often; before any of the body is read."""
    if not options.keys:
        return []
    return [
        changing("keys", files.keys, f"{TYPE}.http.lua.v3.Lua"),
        changing("limits", files.limits, f"{TYPE}.http.local_ratelimit.v3.LocalRateLimit"),
    ]


def _chains(
    options: DoorOptions, files: DoorFiles, filters: list[dict[str, Any]], protocols: list[str]
) -> list[dict[str, Any]]:
    """What becomes of a connection: the filters, behind TLS where that is on; who then speaks plainly is told so."""
    if not options.tls:
        return [{"filters": filters}]
    source = {"path_config_source": {"path": str(files.certificate)}}
    context: dict[str, Any] = {
        "alpn_protocols": protocols,
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "tls_certificate_sds_secret_configs": [{"name": "server", "sds_config": source}],
    }
    if options.client_ca:
        context["validation_context"] = {"trusted_ca": {"filename": str(files.client_ca)}}
    socket = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": DOWNSTREAM_TLS,
            "common_tls_context": context,
            "require_client_certificate": options.client_ca,
        },
    }
    text = json.dumps({"error": "this port takes TLS only; use https, or tls=True or ca= of VivaceClient"})
    head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(text)}"
    plain = {
        "@type": f"{TYPE}.network.direct_response.v3.Config",
        "response": {"inline_string": f"{head}\r\nconnection: close\r\n\r\n{text}"},
    }
    return [
        {
            "filter_chain_match": {"transport_protocol": "tls"},
            "filters": filters,
            "transport_socket": socket,
            "transport_socket_connect_timeout": f"{options.silent_s:g}s",
        },
        {
            "filter_chain_match": {"transport_protocol": "raw_buffer"},
            "filters": [{"name": "envoy.filters.network.direct_response", "typed_config": plain}],
        },
    ]


def _listener(
    name: str,
    options: DoorOptions,
    files: DoorFiles,
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
        "route_config": {"name": name, "virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]}
        | {"request_headers_to_remove": [*TRIAL_HEADERS, *(OWN_HEADERS if options.keys else [])]},
        "http_filters": [
            *_access_filters(options, files),
            {"name": "envoy.filters.http.buffer", "typed_config": limit},
            *([changing("rollout", files.rollout, HEADER_MUTATION)] if checks else []),
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
    inspector = "tls" if options.tls else "http"
    filters = [
        {"name": "envoy.filters.network.connection_limit", "typed_config": most},
        {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager},
    ]
    return {
        "name": name,
        "address": {"socket_address": {"address": options.host, "port_value": port}},
        "listener_filters": [
            {"name": f"envoy.filters.listener.{inspector}_inspector", "typed_config": {"@type": INSPECTORS[inspector]}}
        ],
        "listener_filters_timeout": f"{options.silent_s:g}s",
        "enable_reuse_port": False,  # two doors on one port would share its callers
        "per_connection_buffer_limit_bytes": options.max_body_bytes + (1 << 16),
        "filter_chains": _chains(options, files, filters, ["h2"] if http2 else ["h2", "http/1.1"]),
    }


def listeners(options: DoorOptions, files: DoorFiles) -> list[dict[str, Any]]:
    http, grpc, metrics = options.http_port, options.grpc_port, options.metrics_port
    listening = [
        _listener("http", options, files, http, http_routes(options), _http_checks(options)),
        _listener("metrics", options, files, metrics, metrics_routes(options), []),
    ]
    if contract.ENSEMBLE in options.models:
        listening.append(
            _listener("grpc", options, files, grpc, grpc_routes(options), _grpc_checks(options), http2=True)
        )
    return listening
