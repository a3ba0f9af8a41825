"""Why a server on another machine is not trusted, or does not trust us, in a few words: for whoever looks after
both."""

from __future__ import annotations

import ssl
from dataclasses import asdict, dataclass

UNTRUSTED = "no trust by TLS"


@dataclass(frozen=True)
class Named:
    """The options by which whoever asks names the others, their authority, and a certificate of its own."""

    where: str
    ca: str
    cert: str


SHARDS = Named("--shard-hosts", "--shard-ca", "--shard-cert")
HOSTS = Named("--hosts", "--hosts-ca", "--hosts-cert")
# OpenSSL's codes of what is wrong with a certificate (X509_V_ERR_…)
_EXPIRED, _NOT_YET, _OTHER_NAME, _OTHER_ADDRESS = 10, 9, 62, 64
_THEIRS = {
    _EXPIRED: "its certificate has expired; renew it there",
    _NOT_YET: "its certificate is not valid yet; look at both clocks",
    _OTHER_NAME: "its certificate is for another name than the one in {where}",
    _OTHER_ADDRESS: "its certificate is for another address than the one in {where}",
}
# alerts by which the other side says what it has against our certificate (RFC 8446, 6.2)
_OURS = {
    "CERTIFICATE_REQUIRED": "it wants a certificate; give {cert}",
    "HANDSHAKE_FAILURE": "it wants a certificate; give {cert}",  # TLS 1.2
    "UNKNOWN_CA": "the authority of {cert} is none of its --client-ca",
    "CERTIFICATE_EXPIRED": "{cert} has expired; renew it",
    "CERTIFICATE_UNKNOWN": "it does not take {cert}; its --client-ca has to be the authority of that",
    "BAD_CERTIFICATE": "it does not take {cert}; its --client-ca has to be the authority of that",
}
TLS_ONLY = "it takes TLS only; give {ca}"
PLAIN = "it speaks no TLS; leave {ca} out, or give it --tls-cert"


def distrust(error: Exception, named: Named = SHARDS) -> str:
    """Of an SSLError, or of a refusal that speaks of TLS."""
    return f"{UNTRUSTED}: {_reason(error).format(**asdict(named))}"


def _reason(error: Exception) -> str:
    if not isinstance(error, ssl.SSLError):
        return TLS_ONLY
    if isinstance(error, ssl.SSLCertVerificationError):
        unknown = "its certificate is not of the authority in {ca} (" + _literal(error.verify_message) + ")"
        return _THEIRS.get(error.verify_code, unknown)
    reason = error.reason or ""
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return PLAIN
    known = next((words for alert, words in _OURS.items() if reason.endswith(alert)), "")
    return known or _literal(reason.lower() or str(error))


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
