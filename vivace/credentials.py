"""How a client says who it is, and knows who answers: a key, TLS, a certificate of its own."""

from __future__ import annotations

import os
import ssl
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

KEY_VARIABLE, CA_VARIABLE = "VIVACE_KEY", "VIVACE_TLS_CA"
SYSTEM = "system"
NO_LIMIT = -1  # of a gRPC message, as in tritonclient


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """``key``: sent with each call. ``tls``: the connection is encrypted and the server's certificate checked against
    ``ca``, a PEM file that holds it or its authority ("" or "system": the authorities that come with gRPC or the
    system); a ``ca`` or ``cert`` alone means TLS as well. ``cert``: PEM files of the caller's own certificate and its
    key, where a server asks for one. ``server_name``: what the certificate must be for ("": the host of the address).
    What is None comes from VIVACE_KEY and VIVACE_TLS_CA. Raises ValueError for what cannot be sent or read."""

    key: str | None = field(default=None, repr=False)
    tls: bool = False
    ca: str | Path | None = None
    cert: tuple[str | Path, str | Path] | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        key = os.environ.get(KEY_VARIABLE, "") if self.key is None else self.key
        ca = os.environ.get(CA_VARIABLE, "") if self.ca is None else str(self.ca)
        if not isinstance(key, str) or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"key: expected printable ASCII without blanks; look at {KEY_VARIABLE} too")
        if self.cert is not None and (isinstance(self.cert, str) or len(self.cert) != 2):
            raise ValueError("cert: expected two files, (certificate, key)")
        for name, file in (("ca", ca), *(("cert", str(file)) for file in self.cert or ())):
            if file not in ("", SYSTEM) and not os.access(file, os.R_OK):
                raise ValueError(f"{name}: cannot read {file}; expected a PEM file")
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "tls", bool(self.tls or ca or self.cert))
        object.__setattr__(self, "ca", "" if ca == SYSTEM else ca)

    @property
    def headers(self) -> dict[str, str] | None:
        """Of each call."""
        return {"authorization": f"Bearer {self.key}"} if self.key else None

    def options(self) -> dict[str, Any]:
        """As arguments of a client."""
        return asdict(self)

    @property
    def _channel_options(self) -> list[tuple[str, Any]]:
        lengths = [(f"grpc.max_{way}_message_length", NO_LIMIT) for way in ("send", "receive")]
        return [*lengths, *([("grpc.ssl_target_name_override", self.server_name)] if self.server_name else [])]

    def _channel_credentials(self) -> Any:
        import grpc

        files = (self.ca or None, *(reversed(self.cert) if self.cert else (None, None)))
        roots, key, certificate = (None if file is None else Path(file).read_bytes() for file in files)
        return grpc.ssl_channel_credentials(roots, key, certificate)

    def grpc_client(self, module: Any, url: str) -> Any:
        """The client of ``tritonclient.grpc`` or its ``aio``."""
        if not self.tls:
            return module.InferenceServerClient(url)
        more = {"channel_args": self._channel_options} if self.server_name else {}
        return module.InferenceServerClient(url, creds=self._channel_credentials(), **more)

    def channel(self, module: Any, url: str) -> Any:
        """The channel of ``grpc`` or ``grpc.aio``, for messages of any length."""
        if not self.tls:
            return module.insecure_channel(url, self._channel_options)
        return module.secure_channel(url, self._channel_credentials(), self._channel_options)

    def ssl_context(self) -> ssl.SSLContext | None:
        """For HTTP; None without TLS. Raises ValueError for files that are no certificates."""
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=str(self.ca) or None)
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC: a server's own certificate may be given
            if self.cert is not None:
                context.load_cert_chain(*self.cert)
        except ssl.SSLError as error:
            raise ValueError(f"ca, cert: expected PEM files: {error}") from None
        return context
