"""What is looked at before a server starts: its addresses and ports, what it is told, and what a launcher left that was
killed outright."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import resource
import shutil
import socket
import tempfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from serving.door.options import AccessOptions, DoorOptions
from serving.profiles import ENSEMBLE
from serving.releases import HELD, is_free
from serving.repository import models, read_config
from serving.runtime.cache_settings import CacheSettings, StateSettings
from serving.runtime.explore import check_share
from serving.runtime.ruled import SCHEMA
from serving.runtime.rules import Rule, RulesError, parse_rules, read_rules, rules_file
from serving.segments import SHM, SHM_PREFIX, Segments
from serving.wheel import ServerError
from vivace import contract
from vivace.impressions.samples import SampleOptions
from vivace.live import RECENT
from vivace.shard_contract import shard_model
from vivace.step_contract import ENCODER_STEP
from vivace.store.interface import StoreError

LEFTOVER = "vivace-triton-"  # how a launcher's folder for temporary files is called
PREFIX_FILE = "segments"  # in it: the prefix of its shared memory
ENVIRONMENTS = Path("/tmp")  # where Triton's Python backend makes a folder for itself, whatever TMPDIR says
LEAST_FILES = 512  # descriptors: below it a few hundred callers stop every answer
FILES_OF_OUR_OWN = 256
START_MS = 2000.0  # a shared store may take so long to answer a server that starts


# -- addresses and ports -------------------------------------------------------------------------------
def local_address(host: str) -> str:
    """The IPv4 address that ``host`` names. Raises ServerError where it is none of this machine."""
    try:
        address = socket.gethostbyname(host)
        with socket.socket() as s:
            s.bind((address, 0))
    except (OSError, UnicodeError) as error:
        raise ServerError(f"--host {host}: expected an IPv4 address of this machine or its name; {error}") from None
    return address


def check_exposure(
    host: str, address: str, guard: bool, access: AccessOptions | None = None, shard: bool = False
) -> None:
    """Raises ServerError for an address that others reach without the guard, or without keys and TLS where nobody said
    that its network is trusted; and for keys or TLS without the guard, which has them. ``shard``: one, that only other
    servers ask: it wants their certificates, or needs no guard on such a network."""
    access = access or AccessOptions()
    if shard:
        _check_exposure_of_shard(host, address, access)
    if not guard and (access.keys or access.certificate or access.client_ca):
        raise ServerError("--no-guard: expected the guard with --keys or TLS, as those are its; leave --no-guard out")
    if ipaddress.ip_address(address).is_loopback or shard:
        return
    if not guard:
        raise ServerError(
            f"--host {host}: expected a loopback address without the guard, as Triton's own port takes whatever it is "
            "sent; leave --no-guard out"
        )
    missing = [option for option, there in (("--keys", access.keys), ("--tls-cert", access.certificate)) if not there]
    if missing and not access.insecure_network:
        raise ServerError(
            f"--host {host}: others reach this address, and without {' and '.join(missing)} anyone of them may call or "
            "read along; give them, or --insecure-network where the network is trusted"
        )


def _check_exposure_of_shard(host: str, address: str, access: AccessOptions) -> None:
    if access.keys is not None:
        raise ServerError("--keys: a shard knows the servers that ask it by their certificates; give --client-ca")
    if access.certificate is not None and access.client_ca is None:
        raise ServerError("--tls-cert: expected --client-ca with it, the authority of the servers that ask this shard")
    exposed = not ipaddress.ip_address(address).is_loopback
    if exposed and access.certificate is None and not access.insecure_network:
        raise ServerError(
            f"--host {host}: others reach this address, and a shard takes whatever it is sent; give --tls-cert, "
            "--tls-key and --client-ca, or --insecure-network where only the servers that ask it are on that network"
        )


_given: deque[int] = deque(maxlen=64)


def free_port(host: str) -> int:
    """A port that is free now, and none of the last ones that this process was given: they may not be bound yet."""
    while True:
        with socket.socket() as s:
            s.bind((host, 0))
            port = int(s.getsockname()[1])
        if port not in _given:
            _given.append(port)
            return port


def _port_fault(host: str, port: int) -> str:
    """Why a port cannot be had, or ""."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as error:
            return "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
        except OverflowError:
            return "is no port: expected 0 to 65535"
    return ""


def check_ports(host: str, ports: dict[str, int]) -> None:
    """Raises ServerError for options of one port, or a port that cannot be had. 0 stands for any free one."""
    chosen = {name: port for name, port in ports.items() if port}
    for name, port in chosen.items():
        same = [other for other, value in chosen.items() if value == port]
        if len(same) > 1:
            raise ServerError(f"{' and '.join(same)}: expected ports of their own, got {port} for both")
        if fault := _port_fault(host, port):
            raise ServerError(
                f"{name.removeprefix('--').replace('-', ' ')} {port} on {host} {fault}; choose another with {name}"
            )


# -- what it is told -----------------------------------------------------------------------------------
def check_cache(repository: Path, profile: str, cache_bytes: int, answers: CacheSettings | None = None) -> None:
    """Raises ServerError for a cache that is larger than the memory, or that no model of the profile would use."""
    _check_answer_cache(repository, profile, answers)
    if not cache_bytes:
        return
    total = psutil.virtual_memory().total
    if cache_bytes > total // 2:
        raise ServerError(
            f"--cache-mb {cache_bytes >> 20}: expected at most {total >> 21}, half of this machine's memory"
        )
    if not any(read_config(repository, m, profile).response_cache.enable for m in models(repository, profile)):
        raise ServerError(
            f"--cache-mb: the profile {profile or ENSEMBLE} has no cache; serve the profile cached, or leave "
            "--cache-mb out"
        )


def check_state_cache(repository: Path, profile: str, settings: StateSettings | None) -> None:
    """Raises ServerError for a cache of states that does not fit the memory, or that the profile or the run cannot
    use."""
    if settings is None:
        return
    if read_config(repository, contract.ENSEMBLE, profile).platform == "ensemble":
        raise ServerError(
            f"--state-cache-mb: the profile {profile or ENSEMBLE} keeps no states; serve the profile fused, or leave "
            "--state-cache-mb out"
        )
    _check_room("--state-cache-mb", settings.room_bytes)
    if not list((repository / contract.RETRIEVAL).glob(f"*/{ENCODER_STEP}")):
        raise ServerError(
            "--state-cache-mb: this run's retriever moves the states of all events with each new one, or is compiled "
            "with another precision, an index or shards; train with encoder.positions none and compile plainly, or "
            "leave --state-cache-mb out"
        )


def _check_room(option: str, room_bytes: int) -> None:
    """Raises ServerError for shared memory that this machine does not have."""
    most = min(psutil.virtual_memory().total // 2, shutil.disk_usage(SHM).free)
    if room_bytes > most:
        raise ServerError(
            f"{option} {room_bytes >> 20}: expected at most {most >> 20}, what is free in {SHM}, and half of this "
            "machine's memory"
        )


def _check_answer_cache(repository: Path, profile: str, settings: CacheSettings | None) -> None:
    """Raises ServerError for a cache of answers that does not fit the memory, or that the profile does not ask."""
    if settings is None:
        return
    _check_room("--answer-cache-mb", settings.room_bytes)
    if read_config(repository, contract.ENSEMBLE, profile).platform == "ensemble":
        raise ServerError(
            f"--answer-cache-mb: the profile {profile or ENSEMBLE} keeps no answers, as no stage of it sees a whole "
            "one; serve the profile fused, or leave --answer-cache-mb out"
        )


def check_trace_url(url: str) -> None:
    """Raises ServerError for a collector's address that is no http(s) URL."""
    if not url:
        return
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ServerError(f"--trace-url: expected a URL such as http://127.0.0.1:4318/v1/traces, got {url!r}")


def check_store(url: str) -> None:
    """Raises ServerError for a shared store that does not answer or has nothing in it, ValueError for no address."""
    if not url:
        return
    from vivace.store.remote.address import Address, shown
    from vivace.store.remote.store import ValkeyStore

    try:
        with contextlib.closing(ValkeyStore(replace(Address.parse(url), limit_ms=START_MS))) as store:
            filled = store.filled()
    except StoreError as error:
        raise ServerError(f"--store {shown(url)}: {error}; start it, or leave --store out") from None
    if not filled:
        raise ServerError(
            f"--store {shown(url)}: nothing in it, or half a copy; 'vivace store copy --name RUN --to URL' fills it"
        )


def check_log(path: Path) -> None:
    """Raises ServerError where a log cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise ServerError(f"log {path}: cannot be written: {error.strerror}; choose another with --log-file") from None


def raise_descriptor_limit() -> None:
    """As many open files as the system lets this process have: connections are files. Raises ServerError where that is
    too few for a server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        raise ServerError(f"open files: expected a limit of {LEAST_FILES} and more, got {hard}; see 'ulimit -Hn'")
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_for(most: int) -> int:
    """How many callers' connections each port takes: as many as there are descriptors for, ``most`` at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return most
    return max(16, min(most, (soft - FILES_OF_OUR_OWN) // 4))  # two ports, and each call has one to Triton


def door_options(host: str, http_port: int, grpc_port: int, metrics_port: int, shard: int | None = None) -> DoorOptions:
    """A door on these ports, for as many callers as there are descriptors for. ``shard``: in front of that alone."""
    most = connections_for(DoorOptions.max_connections)
    options = DoorOptions(
        host=host, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, max_connections=most
    )
    if shard is None:
        return options
    return replace(options, models=(shard_model(shard),), max_others=options.max_recommends)


def check_path(repository: Path) -> None:
    """Raises ServerError for a path that Triton's Python workers cannot be started with: their arguments are parted at
    blanks."""
    for what, path in (("run", repository.resolve()), ("TMPDIR", Path(tempfile.gettempdir()))):
        if any(c.isspace() for c in str(path)):
            raise ServerError(
                f"{what} {path}: expected a path without blanks, as Triton's workers part it there; move it"
            )


# -- what was left -------------------------------------------------------------------------------------
def check_variant(variant: str, impressions: bool) -> None:
    """Raises ServerError for a name that says nothing, or two things."""
    if variant and not impressions:
        raise ServerError(f"--variant {variant}: expected --impressions with it, the log that names it")
    if variant == contract.TRIAL:
        raise ServerError(f"--variant {contract.TRIAL}: 'vivace rollout' calls its arm so; choose another name")


def check_rules(release: Path, file: Path | None = None, text: str | None = None) -> tuple[Rule, ...]:
    """The business rules that a version follows, of ``file`` or its run's; ``text``: what was read of it. Raises
    ServerError for rules that say nothing that can be done, or that a version of before them would not follow."""
    file = file or rules_file(release)
    if not (file.exists() if text is None else text):
        return ()
    schemas = sorted(release.glob(f"{contract.RESPONSE}/*/{SCHEMA}"))
    if not schemas:
        raise ServerError(f"{file}: {release.name} was made before there were rules; run 'vivace compile' again")
    try:
        return parse_rules(read_rules(file) if text is None else text, contract.DataSchema.load(schemas[0]))
    except RulesError as error:
        raise ServerError(f"{file}: {error}") from None


def check_explore(share: float, impressions: bool, answer_cache: bool) -> None:
    """Raises ServerError or ValueError for an exploration that nobody could learn from."""
    check_share(share)
    if share and not impressions:
        raise ServerError("--explore: expected --impressions with it, the log of what was shown and with which chance")
    if share and answer_cache:
        raise ServerError(
            "--explore: goes without --answer-cache-mb, as an answer given again leaves nothing to chance"
        )


def check_parity(share: float, impressions: bool, repository: Path) -> None:
    """Raises ServerError or ValueError for samples that could not be computed again."""
    SampleOptions("", share)
    if share and not impressions:
        raise ServerError("--parity: expected --impressions with it, the log of what was answered")
    if share and any(repository.glob(f"*/*/{RECENT}")):
        raise ServerError("--parity: goes without live counters, whose state at a request is not kept")


def sweep_leftovers() -> None:
    """Removes folders, shared memory and workers of launchers that were killed outright: what nobody holds
    (``serving.releases.held``)."""
    for folder in Path(tempfile.gettempdir()).glob(f"{LEFTOVER}*"):
        with contextlib.suppress(OSError):  # another start may sweep the same
            if folder.stat().st_uid == os.getuid() and (folder / HELD).exists() and is_free(folder):
                _end_workers(folder)
                prefix = (folder / PREFIX_FILE).read_text() if (folder / PREFIX_FILE).exists() else ""
                if prefix.startswith(SHM_PREFIX) and "/" not in prefix:
                    Segments(prefix).remove()
                shutil.rmtree(folder, ignore_errors=True)


def _end_workers(folder: Path) -> None:
    """Ends the workers whose program lies in ``folder``: one whose server was killed while it handed over an answer
    waits for ever."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"{folder}/"):
                process.kill()


MAKES_S = 10.0  # after its start a tritonserver has made its folder


def remove_environments(launched: float) -> None:
    """Removes the empty folder that a tritonserver of ours, launched then, leaves where it ends by a signal; it makes
    it within seconds of its start. None that another tritonserver of this user, started at about that time, may have
    made: it ends at once without its own."""
    started = [p.info["create_time"] for p in psutil.process_iter(["name", "create_time", "status"]) if _alive(p)]
    for folder in ENVIRONMENTS.glob("python_env_*"):
        with contextlib.suppress(OSError):  # one that is not empty is someone's
            status = folder.stat()
            ours = status.st_uid == os.getuid() and launched <= status.st_ctime <= min(launched + MAKES_S, time.time())
            if ours and not any(abs(other - status.st_ctime) <= MAKES_S for other in started):
                folder.rmdir()


def _alive(process: psutil.Process) -> bool:
    """Whether it is a tritonserver that lives."""
    return bool(process.info["name"] == "tritonserver" and process.info["status"] != psutil.STATUS_ZOMBIE)
