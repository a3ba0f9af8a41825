"""Who is let in, as files that Envoy reads: the callers' keys and their limits, the certificate. They follow the files
of whoever runs the server: a key that is added or taken away, a certificate that is renewed, counts within seconds."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from serving.door.extension import extension
from serving.door.keys import Key, KeysError, read_keys, write_private
from serving.door.listeners import FOLDER
from serving.door.options import AccessOptions, DoorFiles, DoorOptions
from serving.door.routes import TYPE
from serving.door.tls import TlsError, check_ca, check_pair
from serving.wheel import ServerError

log = logging.getLogger("vivace.serve")

PROBES = "-"  # what asks without a key whether the server works, all together
PROBES_RATE = 50  # calls a second
LOOK_S = 1.0
SECRET = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"


def check_access(options: AccessOptions) -> None:
    """Raises ServerError that names the option, before anything is started."""
    if (options.certificate is None) != (options.private_key is None):
        raise ServerError("--tls-cert and --tls-key: expected both or neither")
    if options.certificate is not None and options.private_key is not None:
        check_pair(options.certificate, options.private_key)
    if options.client_ca is not None:
        if options.certificate is None:
            raise ServerError("--client-ca: expected --tls-cert and --tls-key, or --tls self-signed, with it")
        check_ca(options.client_ca)
    if options.keys is not None:
        try:
            keys = read_keys(options.keys)
        except KeysError as error:
            raise ServerError(f"--keys {error}") from None
        if not keys:
            raise ServerError(
                f"--keys {options.keys}: expected a key, got none; 'vivace keys add NAME --file' adds one"
            )


def with_access(options: DoorOptions, access: AccessOptions) -> DoorOptions:
    """``options`` of a door whose callers are asked for what ``access`` names."""
    keys, tls, client_ca = (bool(part) for part in (access.keys, access.certificate, access.client_ca))
    return replace(options, keys=keys, tls=tls, client_ca=client_ca)


def keys_filter(keys: list[Key]) -> str:
    """Names are letters, digits, _ and - (``keys.NAME``), digests hex: nothing of them needs an escape."""
    rows = [
        f'["{k.sha256}"]={{"{k.name}",{str(k.write).lower()}{f",{int(k.expires.timestamp())}" if k.expires else ""}}}'
        for k in keys
    ]
    code = "\n".join(
        [(FOLDER / "sha256.lua").read_text(), f"local KEYS={{{','.join(rows)}}}", (FOLDER / "keys.lua").read_text()]
    )
    return extension("keys", {"@type": f"{TYPE}.http.lua.v3.Lua", "default_source_code": {"inline_string": code}})


def limits_filter(keys: list[Key]) -> str:
    """Tokens of each key by its name; what has no limit of its own has none."""
    always = {"default_value": {"numerator": 100}}
    rates = {key.name: key.rate for key in keys} | {PROBES: PROBES_RATE}
    of_key = {"request_headers": {"header_name": "x-vivace-key", "descriptor_key": "key"}}
    config = {
        "@type": f"{TYPE}.http.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "limits",
        "filter_enabled": always,
        "filter_enforced": always,
        "rate_limits": [{"actions": [of_key]}],
        "descriptors": [
            {
                "entries": [{"key": "key", "value": name}],
                "token_bucket": {"max_tokens": rate, "tokens_per_fill": rate, "fill_interval": "1s"},
            }
            for name, rate in rates.items()
        ],
    }
    return extension("limits", config)


def certificate_secret(certificate: Path, private_key: Path) -> str:
    """Raises TlsError for a pair that no caller would take."""
    check_pair(certificate, private_key)
    pair = {
        "certificate_chain": {"inline_string": certificate.read_text()},
        "private_key": {"inline_string": private_key.read_text()},
    }
    return json.dumps({"resources": [{"@type": SECRET, "name": "server", "tls_certificate": pair}]})


class Access:
    """Writes what Envoy reads into the door's folder and follows the files that it comes from; a context manager."""

    def __init__(self, options: AccessOptions, files: DoorFiles) -> None:
        self.options, self.files = options, files
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="access", daemon=True)
        self._parts: list[tuple[tuple[Path, ...], Callable[[], None]]] = []

    def __enter__(self) -> Access:
        o = self.options
        check_access(o)
        if o.keys is not None:
            self._parts.append(((o.keys,), self._write_keys))
        if o.certificate is not None and o.private_key is not None:
            self._parts.append(((o.certificate, o.private_key), self._write_certificate))
        if o.client_ca is not None:
            write_private(self.files.client_ca, check_ca(o.client_ca))
        for _, write in self._parts:
            write()
        if self._parts:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._parts:
            self._thread.join(timeout=10)

    def _write_keys(self) -> None:
        assert self.options.keys is not None
        keys = read_keys(self.options.keys)
        write_private(self.files.limits, limits_filter(keys))  # first: no key is known before its limit is
        write_private(self.files.keys, keys_filter(keys))

    def _write_certificate(self) -> None:
        assert self.options.certificate is not None and self.options.private_key is not None
        secret = certificate_secret(self.options.certificate, self.options.private_key)
        write_private(self.files.certificate, secret)

    def _follow(self) -> None:
        seen = {files: _state(files) for files, _ in self._parts}
        while not self._stop.wait(LOOK_S):
            for files, write in self._parts:
                if (now := _state(files)) == seen[files]:
                    continue
                seen[files] = now
                try:
                    write()
                    log.info("door: took what changed in %s", " and ".join(map(str, files)))
                except (KeysError, TlsError, OSError) as error:
                    log.warning("door: goes on with what it had: %s", error)


def _state(files: tuple[Path, ...]) -> list[tuple[int, int, int] | None]:
    """What differs after a change."""
    state: list[tuple[int, int, int] | None] = []
    for path in files:
        try:
            status = path.stat()
            state.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            state.append(None)
    return state
