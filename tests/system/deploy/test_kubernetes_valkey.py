"""The Valkey of the Kubernetes manifests: its own command and settings, run by the real valkey-server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import valkey

from benchmarks.local_valkey import binary, free_port
from tests.support import PATIENCE_S, wait_until
from tests.unit.deploy.test_kubernetes import of_kind, rendered

PASSWORD = "not in any argument"


@pytest.fixture
def port(tmp_path):
    (container,) = rendered("overlays/cpu")["statefulset/vivace-valkey"]["spec"]["template"]["spec"]["containers"]
    (settings,) = [m["data"] for m in of_kind("overlays/cpu", "ConfigMap") if "valkey.conf" in m["data"]]
    port, folders = free_port(), {"/etc/valkey": "etc", "/run/valkey": "run", "/data": "data"}
    texts = {"settings": settings["valkey.conf"].replace("6379", str(port)), "command": container["args"][0]}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == set(folders)
    for path, name in folders.items():
        (tmp_path / name).mkdir()
        texts = {what: text.replace(path, str(tmp_path / name)) for what, text in texts.items()}
    (tmp_path / "etc" / "valkey.conf").write_text(texts["settings"])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "valkey-server").symlink_to(binary())
    (variable,) = container["env"]
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", variable["name"]: PASSWORD}
    process = subprocess.Popen([*container["command"], texts["command"]], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield port, process
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def up(client: valkey.Valkey) -> bool:
    try:
        return bool(client.ping())
    except valkey.exceptions.ConnectionError:
        return False


def test_it_asks_for_the_password_and_keeps_what_it_acknowledged(port, tmp_path):
    number, process = port
    with valkey.Valkey(port=number, password=PASSWORD) as client, valkey.Valkey(port=number) as stranger:
        wait_until(lambda: up(client), "a server that answers")
        with pytest.raises(valkey.exceptions.AuthenticationError):
            stranger.ping()
        settings = client.config_get("append*") | client.config_get("maxmemory*")
        assert settings["appendonly"] == "yes" and settings["appendfsync"] == "everysec"
        assert settings["maxmemory-policy"] == "noeviction" and int(settings["maxmemory"]) == 2 << 30
        client.set("event", 1)
        assert list((tmp_path / "data" / "appendonlydir").iterdir())
    assert PASSWORD.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert (tmp_path / "run" / "valkey.conf").stat().st_mode & 0o077 == 0
