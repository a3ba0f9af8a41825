"""What a run's search adds to its model repository."""

from __future__ import annotations

from pathlib import Path

from vivace import contract
from vivace.run import SEARCH, Run

FOLDER = SEARCH
LAYOUT = 3  # of the ranker's features and the index: a search of another layout is trained again


def files_of(root: Path) -> dict[str, dict[str, Path]]:
    """What a run's search adds to the model repository, by stage; {} without search."""
    run = Run(root)
    if not run.has(SEARCH):
        return {}
    # its libraries, which a run without search does without
    from search.online import INDEX_FILES, OPTIONAL_INDEX_FILES, RANKER_FILES

    folder = run.search
    index = (*INDEX_FILES, *(n for n in OPTIONAL_INDEX_FILES if (folder / n).exists()))
    return {
        contract.QUERY_SEARCH: {n: folder / n for n in index},
        contract.RESPONSE: {n: folder / n for n in RANKER_FILES},
    }


def features_of(root: Path) -> int:
    """X of a run's search ranker; 0 without search. Raises ValueError for one of an older layout."""
    run = Run(root)
    if not run.has(SEARCH):
        return 0
    manifest = run.manifest(SEARCH)
    if (layout := manifest["config"].get("layout", 1)) != LAYOUT:
        raise ValueError(
            f"search: expected features of layout {LAYOUT}, got {layout} in {run.search}; run "
            "'vivace train --task search'"
        )
    return int(manifest["results"]["features"])
