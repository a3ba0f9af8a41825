"""Filters whose configuration Envoy reads again when another file takes the place of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def changing(name: str, path: Path, kind: str) -> dict[str, Any]:
    """Such a filter in a listener; without a file it lets nothing through."""
    source = {"path_config_source": {"path": str(path)}}
    return {"name": name, "config_discovery": {"config_source": source, "type_urls": [kind]}}


def extension(name: str, config: dict[str, Any]) -> str:
    """What stands in its file."""
    kind = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
    return json.dumps({"resources": [{"@type": kind, "name": name, "typed_config": config}]})
