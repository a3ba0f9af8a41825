"""What pip's ``nvidia-pytriton`` wheel carries of Triton, laid out as tritonserver wants it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path


class ServerError(RuntimeError):
    """Triton did not start or stopped by itself; the message ends with the last lines of its log."""


def wheel_folder() -> Path:
    """Where pip put ``pytriton``; raises ServerError if it is not installed."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError("tritonserver: the package nvidia-pytriton is not installed; run 'make setup'")
    return Path(spec.origin).parent


def python_library() -> Path:
    """The shared library of this Python, which Triton's Python stub is linked with. Raises ServerError where there is
    none: a Python that was built without one cannot run the stub."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    places = [sysconfig.get_config_var(key) for key in ("LIBDIR", "LIBPL")]
    arch = sysconfig.get_config_var("MULTIARCH") or ""
    places += [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib/{arch}", f"/usr/lib/{arch}", "/usr/lib64", "/usr/lib"]
    for place in filter(None, places):
        if (Path(place) / name).exists():
            return Path(place) / name
    raise ServerError(
        f"tritonserver: its Python backend needs {name}, and {sys.base_prefix} has none (looked in "
        f"{', '.join(dict.fromkeys(filter(None, places)))}); install the package libpython, or use a Python that was "
        "built with --enable-shared"
    )


def backend_folder(root: Path) -> Path:
    """``root/backends``: Triton's Python backend with the stub of this Python, and ours by name."""
    wheel = wheel_folder() / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        versions = sorted(p.name for p in (wheel / "python_backend_stubs").iterdir())
        raise ServerError(f"tritonserver: no Python backend stub for Python {version}; the wheel has {versions}")
    python = root / "backends" / "python"
    python.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy(wheel / "backends" / "python" / name, python / name)
    shutil.copy(stub, python / stub.name)
    (python / stub.name).chmod(0o755)
    for backend in sorted((Path(__file__).parent / "triton" / "backends").glob("*/model.py")):
        folder = root / "backends" / backend.parent.name
        folder.mkdir()
        shutil.copy(backend, folder / "model.py")
    return root / "backends"
