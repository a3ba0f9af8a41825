"""Envoy's configuration, rendered from what the door lets through.

Only the public models' paths exist; a body has a bounded length and arrives at Triton in one piece with its length;
what a route cannot see is checked by ``checks.lua``. A call of ``recommend`` that the server's death cut off is sent
again until the server is back; a call of ``append_event`` is not, as it may have been stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving.door.endpoints import EXPLAINS, GRPC, METRICS, OTHERS, RECOMMEND, TRIAL, endpoints_file, pipe
from serving.door.hosts import READY
from serving.door.listeners import listeners
from serving.door.options import DoorFiles, DoorOptions
from serving.door.routes import TRIAL_OR_ELSE
from serving.door.statistics import stats_config

MONITORS = "type.googleapis.com/envoy.extensions.resource_monitors"
IN_FLIGHT = r"cluster\..*\.upstream_rq_(pending_)?active"


def _cluster(name: str, folder: Path, options: DoorOptions, most: int, http2: bool = False) -> dict[str, Any]:
    """Of the endpoints in its file under ``folder``. ``most``: calls at once."""
    source = {"resource_api_version": "V3", "path_config_source": {"path": str(endpoints_file(folder, name))}}
    cluster: dict[str, Any] = {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": source},
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        # if none is well, all are asked; of those on trial none
        "common_lb_config": {"healthy_panic_threshold": {"value": 0 if name == TRIAL else 1}},
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
    if options.by_user and name == RECOMMEND:  # Maglev (Eisenbud et al. 2016), bounded loads (Mirrokni et al. 2018)
        cluster["lb_policy"] = "MAGLEV"
        bound = {"hash_balance_factor": round(100 * options.most_of_mean)}
        cluster["common_lb_config"]["consistent_hashing_lb_config"] = bound
    # not of TRIAL: an aggregate keeps the health that an endpoint had when it came, so its watchdog takes it out and in
    if name in (RECOMMEND, EXPLAINS, OTHERS):  # who does not say that it lives is left out, where another does
        live = {"path": READY if options.upstream else "/v2/health/live"}  # a guard speaks of all parts
        seldom = {"timeout": "0.5s", "interval": "0.25s", "unhealthy_threshold": 2, "healthy_threshold": 1}
        cluster["ignore_health_on_host_removal"] = True
        cluster["health_checks"] = [seldom | {"http_health_check": live, "no_traffic_interval": "0.25s"}]
    explicit = {"http2_protocol_options": {"max_concurrent_streams": 2048}} if http2 else {"http_protocol_options": {}}
    protocol = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": explicit,
        "common_http_protocol_options": {"idle_timeout": f"{options.idle_s:g}s"},  # what a burst took is given back
    }
    if options.upstream:
        cluster |= options.upstream.cluster(name)
    cluster["typed_extension_protocol_options"] = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol}
    return cluster


def _trial_or_else() -> dict[str, Any]:
    kind = "type.googleapis.com/envoy.extensions.clusters.aggregate.v3.ClusterConfig"
    return {
        "name": TRIAL_OR_ELSE,
        "connect_timeout": "1s",
        "lb_policy": "CLUSTER_PROVIDED",
        "cluster_type": {
            "name": "envoy.clusters.aggregate",
            "typed_config": {"@type": kind, "clusters": [TRIAL, RECOMMEND]},
        },
    }


def render(options: DoorOptions, files: DoorFiles) -> str:
    """The bootstrap as JSON."""
    folder, machines = files.folder, len(options.upstream.hosts) if options.upstream else 1
    config = {
        "node": {"id": "vivace", "cluster": "vivace"},  # Envoy wants them where it reads files again
        "admin": {"address": pipe(files.admin)},
        "static_resources": {
            "listeners": listeners(options, files),
            "clusters": [
                _cluster(RECOMMEND, folder, options, machines * options.max_recommends),
                _cluster(TRIAL, folder, options, options.max_recommends),
                _trial_or_else(),
                _cluster(EXPLAINS, folder, options, machines * options.max_explains),
                _cluster(OTHERS, folder, options, machines * options.max_others),
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
