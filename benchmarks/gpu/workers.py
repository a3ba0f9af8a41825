"""An environment for Triton's Python workers on a machine where nothing can be installed.

The workers ignore PYTHONPATH: they find their modules by the ``python3`` that is first on PATH. So this makes one, of
this Python, that sees what this process sees; NumPy 1 comes first where this process has NumPy 2, as the stub of Triton
2.51 takes each of NumPy 2's arrays for one of 0 bytes.
"""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np

from serving.wheel import ServerError, wheel_folder
from vivace.manifest import CHECKOUT

NUMPY_1 = "numpy1"  # folder beside the one that holds pytriton (pieces.toml)


def numpy_one() -> list[Path]:
    """The folder with NumPy 1, where it is needed. Raises ServerError if it is not there."""
    if int(np.__version__.split(".")[0]) < 2:
        return []
    folder = wheel_folder().parent.parent / NUMPY_1
    if not (folder / "numpy").is_dir():
        raise ServerError(
            f"Triton 2.51's Python workers: expected NumPy 1 in {folder}, as this Python has {np.__version__}; "
            f"pip install --no-deps --target {folder} numpy==1.26.4"
        )
    return [folder]


def make(folder: Path) -> Path:
    """Makes the environment and returns its ``python``."""
    venv.EnvBuilder(symlinks=True, with_pip=False, clear=True).create(folder)
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    seen = [p for p in sys.path if p and Path(p).is_dir() and p not in standard and not p.endswith("lib-dynload")]
    packages = next((folder / "lib").glob("python*/site-packages"))
    paths = dict.fromkeys(str(p.resolve()) for p in [*numpy_one(), *map(Path, seen), CHECKOUT])
    (packages / "vivace.pth").write_text("\n".join(paths) + "\n")
    return folder / "bin" / "python"
