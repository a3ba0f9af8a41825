"""Certificates of the door: looked at before anything starts, and made for trials."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
import socket
import ssl
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from serving.wheel import ServerError

DAYS = 365  # of a certificate made here
EXPIRED, NOT_YET = 10, 9  # OpenSSL's codes
BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class TlsError(ServerError):
    """A certificate or its key cannot be used; the message names the file."""


@dataclass(frozen=True)
class Certificate:
    """What callers see of a server."""

    names: tuple[str, ...]
    """Host names and addresses that it is for."""
    fingerprint: str
    """SHA-256 of the certificate, as OpenSSL prints it."""


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError as error:
        raise TlsError(f"{option} {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TlsError(f"{option} {path}: expected PEM, got something else") from None


def check_pair(certificate: Path, key: Path) -> Certificate:
    """Raises TlsError where no caller would be served with this pair: not there, not PEM, not of each other, expired,
    or without a name."""
    text = _text(certificate, "--tls-cert")
    _text(key, "--tls-key")
    if BEGIN not in text or END not in text:
        raise TlsError(f"--tls-cert {certificate}: expected a certificate as PEM, got something else")
    own = text[text.index(BEGIN) : text.index(END) + len(END)] + "\n"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(certificate, key, password=lambda: "")  # else it would ask at the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError(f"--tls-key {key}: not the key of {certificate}; give two that belong together") from None
        raise TlsError(
            f"--tls-cert {certificate}, --tls-key {key}: expected PEM, the key without a passphrase: {error}"
        ) from None
    try:
        seen = _handshake(server, own)
    except ssl.SSLCertVerificationError as error:
        why = {EXPIRED: "has expired; renew it", NOT_YET: "is not valid yet; look at the clock"}
        raise TlsError(f"--tls-cert {certificate}: {why.get(error.verify_code, error.verify_message)}") from None
    except ssl.SSLError as error:
        raise TlsError(f"--tls-cert {certificate}: no caller would take it: {error}") from None
    names = tuple(str(value) for _, value in seen.get("subjectAltName", ()))
    if not names:
        raise TlsError(
            f"--tls-cert {certificate}: expected a subject alternative name, as callers compare it; got none"
        )
    digits = hashlib.sha256(ssl.PEM_cert_to_DER_cert(own)).hexdigest().upper()
    return Certificate(names, ":".join(digits[i : i + 2] for i in range(0, len(digits), 2)))


def _handshake(server: ssl.SSLContext, certificate: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """What a caller that trusts this very certificate sees of it; without a network. Raises ssl.SSLError."""
    caller = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    caller.check_hostname = False
    caller.load_verify_locations(cadata=certificate)
    caller.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    near, far = caller.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for side in (near, far):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return near.getpeercert() or {}  # type: ignore[return-value]


def check_ca(path: Path, option: str = "--client-ca") -> str:
    """The PEM of authorities whose callers are let in, or that ``option`` names. Raises TlsError for what is none."""
    text = _text(path, option)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except ssl.SSLError:
        raise TlsError(f"{option} {path}: expected certificates as PEM, got something else") from None
    return text


def make_pair(folder: Path, names: list[str]) -> tuple[Path, Path]:
    """A certificate that signs itself and its key, for host names and addresses, in a folder of its owner's alone.
    Raises TlsError where openssl is not there or fails."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise TlsError("openssl: not found; install it, or give --tls-cert and --tls-key")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate, key = folder / "cert.pem", folder / "key.pem"
    alternatives = ",".join(f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names)
    config = (
        "[req]\nprompt=no\ndistinguished_name=name\nx509_extensions=more\n"
        f"[name]\nCN=vivace {secrets.token_hex(8)}\n[more]\n"  # of two of one name only one is looked at
        f"subjectAltName={alternatives}\nbasicConstraints=critical,CA:TRUE\nsubjectKeyIdentifier=hash\n"
        "keyUsage=critical,digitalSignature,keyCertSign\nextendedKeyUsage=serverAuth,clientAuth\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".cnf") as file:
        file.write(config)
        file.flush()
        made = subprocess.run(
            [
                openssl, "req", "-x509", "-config", file.name, "-newkey", "ec", "-pkeyopt",
                "ec_paramgen_curve:prime256v1", "-nodes", "-days", str(DAYS), "-keyout", str(key), "-out",
                str(certificate),
            ],
            capture_output=True, text=True, umask=0o077,
        )  # fmt: skip
    if made.returncode:
        raise TlsError(f"openssl: made no certificate in {folder}: {made.stderr.strip()[-300:]}")
    key.chmod(0o600)
    certificate.chmod(0o600)
    return certificate, key


def _is_address(name: str) -> bool:
    try:
        socket.inet_aton(name)
    except OSError:
        return False
    return name.count(".") == 3


def self_signed(folder: Path, address: str) -> tuple[Path, Path, Certificate]:
    """A pair for trials, kept in ``folder`` from one start to the next while it is good for ``address``, so that
    callers can go on trusting it."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    names = ["localhost", "127.0.0.1", socket.gethostname()]
    if address not in (*names, "0.0.0.0"):
        names.append(address)
    with contextlib.suppress(TlsError):
        kept = check_pair(certificate, key)
        if set(names) <= set(kept.names):
            return certificate, key, kept
    make_pair(folder, names)
    return certificate, key, check_pair(certificate, key)
