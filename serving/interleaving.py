"""How a server is started whose answers are drafts of the version on trial and of the served one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from serving.profiles import ONE_PROCESS
from serving.repository import models, read_config
from serving.runtime.interleaved import Interleave, differing
from serving.runtime.rules import deal_places
from serving.server_options import ServerOptions
from serving.shards.servers import shard_count
from serving.start_checks import check_rules
from serving.wheel import ServerError
from vivace import contract


def interleaving(options: ServerOptions, release: Path, salt: str) -> ServerOptions:
    """``options`` of the served version, for a server of ``release`` beside it. ``salt``: of the coins. Both run in one
    process, without caches of answers, as a draft is of one request. Raises ServerError where the two answer other
    outputs, ValueError where a version has no profile that runs as one process."""
    served = options.repository.resolve()
    if any(shard_count(folder) for folder in (served, release)):
        raise ServerError("--interleave: expected versions that were compiled without --shards: one process runs both")
    # of an ensemble the one process has the same answers
    profile = options.profile if contract.RETRIEVAL not in models(served, options.profile) else ONE_PROCESS
    configs = [read_config(folder, contract.ENSEMBLE, profile) for folder in (served, release)]
    if why := differing(*(config.output for config in configs)):
        raise ServerError(f"--interleave: {release.name}: {why}; leave --interleave out")
    if deal_places(check_rules(release, options.rules)):
        raise ServerError(
            "--interleave: rules that pin, cap or make room for new items hold in one ranking, not in a "
            "draft of two; leave --interleave out, or those rules"
        )
    parameters = {name: value.string_value for name, value in configs[0].parameters.items()}
    version = next(p.name for p in (served / contract.ENSEMBLE).iterdir() if p.name.isdigit())
    interleave = Interleave(str(served), version, parameters, salt)
    return replace(
        options, repository=release, profile=profile, cache_bytes=0, answer_cache=None, interleave=interleave
    )
