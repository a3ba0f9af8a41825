"""What the door's ports answer: the public models' paths, where each goes, and nothing else."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from serving.door.endpoints import EXPLAINS, GRPC, METRICS, OTHERS, RECOMMEND, TRIAL
from serving.door.options import PUBLIC, READING, DoorOptions
from vivace import contract
from vivace.explain_contract import EXPLAIN

SERVICE = "/inference.GRPCInferenceService"
GRPC_READS = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig")
TYPE = "type.googleapis.com/envoy.extensions.filters"
BRIDGE = "envoy.filters.http.grpc_http1_reverse_bridge"
UNREADY, STOPPING = "vivace.unready", "vivace.stopping"  # runtime keys, in per cent of the calls
SHADOW = "vivace.shadow"  # the same: calls of which the version on trial gets a copy
USER = "x-vivace-user"  # header that the checks set: by whom a server is chosen (``DoorOptions.balance``)
VARIANT = "x-vivace-variant"  # header that the checks set, of a call and of its answer
ON_TRIAL = "trial"
NOT_TAKEN = "x-vivace-not-taken"  # header of a refusal by a server that stops: another may be asked, whatever it was
TRIAL_OR_ELSE = "trial_or_else"  # a cluster: that on trial, and while nobody of it is well the others


def _retry(options: DoorOptions, twice: bool, hung: bool) -> dict[str, Any]:
    """While a server is away another is asked, or the same until it is back. ``twice``: of calls that may be sent
    twice; of others only those that nobody got. ``hung``: also where a server has not answered for ``try_s``."""
    predicate = "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    another = {
        "name": "envoy.retry_host_predicates.previous_hosts",
        "typed_config": {"@type": f"type.googleapis.com/{predicate}"},
    }
    policy: dict[str, Any] = {
        "retry_on": "connect-failure,refused-stream,reset" if twice else "connect-failure",
        "num_retries": int(options.recovery_s / 0.12),  # waits are drawn from 0 to the interval
        "retry_back_off": {"base_interval": "0.1s", "max_interval": "0.25s"},
        "retry_host_predicate": [another],
        "host_selection_retry_max_attempts": 3,
    }
    if options.upstream:  # a guard that stops says what it has not taken
        policy["retry_on"] += ",retriable-headers"
        policy["retriable_headers"] = [{"name": NOT_TAKEN, "present_match": True}]
    return policy | ({"per_try_timeout": f"{options.try_s:g}s"} if hung else {})


def to(cluster: str, options: DoorOptions, again: bool = False, quick: bool = False) -> dict[str, Any]:
    """``again``: the call may be sent twice. ``quick``: it is, where its answer does not come soon and there are
    several servers; the first of two answers counts."""
    hung = quick and options.several
    hedge = {"hedge_policy": {"hedge_on_per_try_timeout": True}} if hung else {}
    return {
        "cluster": cluster,
        "timeout": f"{options.timeout_s:g}s",
        "retry_policy": _retry(options, again, hung),
    } | hedge


def _infer(model: str, match: dict[str, Any], options: DoorOptions) -> list[dict[str, Any]]:
    """Routes of a model's calls."""
    if model == EXPLAIN:
        return [{"match": match, "route": to(EXPLAINS, options, again=True), "stat_prefix": model}]
    if model != contract.ENSEMBLE:
        longest = {"timeout": f"{options.append_s:g}s"} if model == contract.APPEND_EVENT else {}
        return [{"match": match, "route": to(OTHERS, options) | longest, "stat_prefix": model}]
    sign = {"name": VARIANT, "string_match": {"exact": ON_TRIAL}}
    told = {"header": {"key": VARIANT, "value": ON_TRIAL}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
    on_trial = {
        "match": match | {"headers": [*match["headers"], sign]},
        "route": to(TRIAL_OR_ELSE, options, again=True, quick=True),
        "stat_prefix": ON_TRIAL,
        "response_headers_to_add": [told],
    }
    share = {"default_value": {"numerator": 0}, "runtime_key": SHADOW}
    copies = {"request_mirror_policies": [{"cluster": TRIAL, "runtime_fraction": share}]}
    by_user = {"hash_policy": [{"header": {"header_name": USER}}]} if options.by_user else {}
    route = to(RECOMMEND, options, again=True, quick=True) | copies | by_user
    served = {"match": match, "route": route, "stat_prefix": model}
    return [on_trial, served]


def _away(key: str, match: dict[str, Any], **more: Any) -> dict[str, Any]:
    """503 while ``key`` is set: what the supervisor knows and Triton does not."""
    chosen = {"default_value": {"numerator": 100 if key == UNREADY else 0}, "runtime_key": key}
    if key == STOPPING:
        more["response_headers_to_add"] = [{"header": {"key": NOT_TAKEN, "value": "stopping"}}]
    return {"match": match | {"runtime_fraction": chosen}, "direct_response": {"status": 503}} | more


def method(name: str) -> list[dict[str, Any]]:
    return [{"name": ":method", "string_match": {"exact": name}}]


def refused_pages(options: DoorOptions) -> list[dict[str, Any]]:
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


def _may_not_write(match: dict[str, Any]) -> dict[str, Any]:
    """403 for a key that only reads; ``keys.lua`` says so in a header of its own."""
    sign = {"name": "x-vivace-access", "string_match": {"exact": "read"}}
    text = "key: may only read; ask whoever runs the server for one that may write"
    refusal = {"status": 403, "body": {"inline_string": text}}
    return {"match": match | {"headers": [*match["headers"], sign]}, "direct_response": refusal}


def http_routes(options: DoorOptions) -> list[dict[str, Any]]:
    probes = f"/v2/models/({'|'.join(options.models)})(/versions/[0-9]{{1,9}})?/ready"
    routes: list[dict[str, Any]] = [
        _away(STOPPING, {"prefix": "/v2/models/", "headers": method("POST")}),
        _away(UNREADY, {"path": "/v2/health/ready", "headers": method("GET")}),
        _away(
            UNREADY, {"safe_regex": {"regex": probes}, "headers": method("GET")}
        ),  # Envoy takes so long a regex at most
    ]
    routes += [
        {"match": {"path": path, "headers": method("GET")}, "route": to(OTHERS, options, again=True)}
        for path in ("/v2", "/v2/health/live", "/v2/health/ready")
    ]
    for model in options.models:
        base = f"/v2/models/{model}(/versions/[0-9]{{1,9}})?"
        infer = {"safe_regex": {"regex": f"{base}/infer"}, "headers": method("POST")}
        if options.keys and model not in READING:
            routes.append(_may_not_write(infer))
        routes += _infer(model, infer, options)
        config = "|/config" if model == contract.ENSEMBLE else ""  # those of the others name the store
        look = {"safe_regex": {"regex": f"{base}(/ready{config})?"}, "headers": method("GET")}
        routes.append({"match": look, "route": to(OTHERS, options, again=True)})
    return [*refused_pages(options), *routes, nothing(options.models)]


def _model(name: str) -> list[dict[str, Any]]:
    return [{"name": "x-vivace-model", "string_match": {"exact": name}}]


def nothing(models: tuple[str, ...] = PUBLIC) -> dict[str, Any]:
    text = f"no such path; the public calls are POST /v2/models/MODEL/infer of {', '.join(models)}"
    return {"match": {"prefix": "/"}, "direct_response": {"status": 404, "body": {"inline_string": text}}}


def grpc_routes(options: DoorOptions) -> list[dict[str, Any]]:
    plain = ["grpc-timeout"]  # the client's own timer cuts its wait; Triton 2.51 dies of deadlines it sees
    no_bridge = {"@type": f"{TYPE}.http.grpc_http1_reverse_bridge.v3.FilterConfigPerRoute", "disabled": True}
    readiness = f"{SERVICE}/(ServerReady|ModelReady)"
    away = [
        *(_away(STOPPING, {"prefix": "/", "headers": _model(model)}) for model in PUBLIC),
        _away(UNREADY, {"safe_regex": {"regex": readiness}}, typed_per_filter_config={BRIDGE: no_bridge}),
    ]
    if options.keys:
        writing = (model for model in PUBLIC if model not in READING)
        away += [_may_not_write({"prefix": "/", "headers": _model(model)}) for model in writing]
    # by the model that the checks read in the message; a caller's own header is gone
    of_models = [_infer(model, {"prefix": "/", "headers": _model(model)}, options) for model in PUBLIC]
    routes: list[dict[str, Any]] = [route for of_model in of_models for route in of_model]
    routes += [
        {"match": {"path": f"{SERVICE}/ModelInfer"}, "route": to(OTHERS, options)},
        *(
            {
                "match": {"path": f"{SERVICE}/{call}"},
                "route": to(GRPC, options, again=True),
                "typed_per_filter_config": {BRIDGE: no_bridge},
            }
            for call in GRPC_READS
        ),
    ]
    for route in routes:
        route["request_headers_to_remove"] = plain
    return [*away, *routes, nothing() | {"typed_per_filter_config": {BRIDGE: no_bridge}}]


def metrics_routes(options: DoorOptions) -> list[dict[str, Any]]:
    page = {"match": {"path": "/metrics", "headers": method("GET")}, "route": to(METRICS, options)}
    return [*refused_pages(options), page, nothing()]
