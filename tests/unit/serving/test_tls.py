"""Certificates are looked at before a server starts, and who may be reached from outside."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from serving.door.access import check_access
from serving.door.options import AccessOptions
from serving.door.tls import check_pair, make_pair, self_signed
from serving.start_checks import check_exposure
from serving.wheel import ServerError

NEW = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=x")
NAMED = ("-addext", "subjectAltName=DNS:localhost")


def openssl(folder: Path, name: str, *more: str) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", *NEW, "-keyout", key, "-out", certificate, *more]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


AUTHORITY = (
    "[ca]\ndefault_ca=d\n[d]\ndatabase={0}/index.txt\nnew_certs_dir={0}\nrand_serial=yes\npolicy=p\n"
    "default_md=sha256\ncopy_extensions=copy\n[p]\ncommonName=supplied\n"
)


def dated(folder: Path, name: str, start: str, end: str) -> tuple[Path, Path]:
    """A pair for localhost that is good in other years."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    asked, config = folder / f"{name}.csr", folder / "ca.cnf"
    config.write_text(AUTHORITY.format(folder))
    (folder / "index.txt").write_text("")
    new = ("openssl", "req", "-new", *NEW, "-nodes", "-keyout", key, "-out", asked, *NAMED)
    sign = (
        "openssl",
        "ca",
        "-batch",
        "-selfsign",
        "-config",
        config,
        "-keyfile",
        key,
        "-in",
        asked,
        "-out",
        certificate,
    )
    subprocess.run(new, check=True, capture_output=True)
    subprocess.run(
        [*sign, "-out", certificate, "-notext", "-startdate", start, "-enddate", end], check=True, capture_output=True
    )
    return certificate, key


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Files by what is wrong with them: (certificate, key, words of the error)."""
    folder = tmp_path_factory.mktemp("pairs")
    good, key = make_pair(folder / "good", ["localhost"])
    other = make_pair(folder / "other", ["localhost"])
    text = folder / "text.pem"
    text.write_text("hello")
    return {
        "missing": (folder / "none.pem", key, "cannot be read"),
        "no key": (good, folder / "none.key", "cannot be read"),
        "a folder": (folder, key, "cannot be read"),
        "no PEM": (text, key, "expected a certificate as PEM"),
        "a key that is none": (good, text, "expected PEM"),
        "not its key": (good, other[1], "not the key of"),
        "expired": (*dated(folder, "old", "20200101000000Z", "20200201000000Z"), "has expired"),
        "not yet": (*dated(folder, "new", "20900101000000Z", "20910101000000Z"), "not valid yet"),
        "a passphrase": (*openssl(folder, "locked", "-passout", "pass:secret", *NAMED), "without a passphrase"),
        "no name": (*openssl(folder, "nameless", "-nodes"), "subject alternative name"),
    }  # fmt: skip


KINDS = (
    "missing", "no key", "a folder", "no PEM", "a key that is none", "not its key", "expired", "not yet",
    "a passphrase", "no name",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_that_would_not_serve_is_refused_by_name(pairs, kind):
    certificate, key, words = pairs[kind]
    with pytest.raises(ServerError, match=words) as refused:
        check_access(AccessOptions(certificate=certificate, private_key=key))
    assert str(certificate) in str(refused.value) or str(key) in str(refused.value)


def test_a_good_pair_shows_names_and_openssl_s_fingerprint(tmp_path):
    certificate, key = make_pair(tmp_path, ["localhost", "127.0.0.1"])
    command = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", certificate]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seen = check_pair(certificate, key)
    assert seen.names == ("localhost", "127.0.0.1") and printed.strip().endswith(f"={seen.fingerprint}")
    assert key.stat().st_mode & 0o077 == 0


def test_a_certificate_for_trials_is_kept_while_it_is_good(tmp_path):
    first = self_signed(tmp_path / "tls", "127.0.0.1")[2]
    assert self_signed(tmp_path / "tls", "127.0.0.1")[2] == first
    other = self_signed(tmp_path / "tls", "192.0.2.1")[2]
    assert other != first and "192.0.2.1" in other.names


@pytest.mark.parametrize("given", [{}, {"keys": Path("k")}, {"certificate": Path("c")}])
def test_others_are_served_with_keys_and_tls_or_on_a_trusted_network(given):
    with pytest.raises(ServerError, match=r"--insecure-network"):
        check_exposure("0.0.0.0", "0.0.0.0", True, AccessOptions(**given))
    check_exposure("0.0.0.0", "0.0.0.0", True, AccessOptions(**given, insecure_network=True))
    check_exposure("127.0.0.1", "127.0.0.1", True, AccessOptions(**given))
    check_exposure("0.0.0.0", "0.0.0.0", True, AccessOptions(keys=Path("k"), certificate=Path("c")))


def test_an_authority_goes_with_tls(pairs):
    with pytest.raises(ServerError, match="--client-ca"):
        check_access(AccessOptions(client_ca=pairs["not its key"][0]))
