"""What a run's search adds to its model repository."""

from __future__ import annotations

from pathlib import Path

from search.online import INDEX_FILES, RANKER_FILES
from vivace import contract
from vivace.manifest import MANIFEST, read_manifest

FOLDER = "query_search"  # "search" is that of hyper-parameters
LAYOUT = 2  # of the ranker's features: a search of another layout is trained again


def files_of(root: Path) -> dict[str, dict[str, Path]]:
    """What a run's search adds to the model repository, by stage; {} without search."""
    folder = root / FOLDER
    if not (folder / MANIFEST).exists():
        return {}
    return {
        contract.QUERY_SEARCH: {n: folder / n for n in INDEX_FILES},
        contract.RESPONSE: {n: folder / n for n in RANKER_FILES},
    }


def features_of(root: Path) -> int:
    """X of a run's search ranker; 0 without search. Raises ValueError for one of an older layout."""
    folder = root / FOLDER
    if not (folder / MANIFEST).exists():
        return 0
    manifest = read_manifest(folder, "vivace train --task search")
    if (layout := manifest["config"].get("layout", 1)) != LAYOUT:
        raise ValueError(
            f"search: expected features of layout {LAYOUT}, got {layout} in {folder}; run 'vivace train --task search'"
        )
    return int(manifest["results"]["features"])
