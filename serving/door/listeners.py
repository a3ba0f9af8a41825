"""The door's ports: how long it waits for a caller, what it checks before a call may go on, how it words a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.door.options import DoorOptions
from serving.door.routes import BRIDGE, TYPE, grpc_routes, http_routes, metrics_routes

FOLDER = Path(__file__).parent
INSPECTOR = f"{TYPE}.listener.http_inspector.v3.HttpInspector"
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


def listeners(options: DoorOptions) -> list[dict[str, Any]]:
    return [
        _listener("http", options, options.http_port, http_routes(options), _http_checks()),
        _listener("grpc", options, options.grpc_port, grpc_routes(options), _grpc_checks(), http2=True),
        _listener("metrics", options, options.metrics_port, metrics_routes(options), []),
    ]
