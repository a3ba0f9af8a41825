"""Errors as a user reads them: one line for what is expected to go wrong; our own faults leave a file with the
traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import traceback
from collections.abc import Iterator

import typer

from vivace.cli.options import errors

TRACEBACK = "VIVACE_TRACEBACK"
WORDS = {
    errno.ENOENT: "no such file or folder",
    errno.EISDIR: "is a folder, expected a file",
    errno.ENOTDIR: "is a file, expected a folder",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENOSPC: "no space left on the disk",
    errno.EROFS: "lies on a disk that cannot be written to",
}


def in_words(error: OSError) -> str:
    """What the operating system refused, with the file; our own text where we raised it."""
    if error.errno is None or error.filename is None:
        return str(error)
    return f"{os.fspath(error.filename)}: {WORDS.get(error.errno, error.strerror)}"


def expected(error: Exception) -> str | None:
    """The message of an error that a user can mend; None for a fault of ours."""
    from serving.wheel import ServerError
    from vivace.client import VivaceError
    from vivace.manifest import BusyError
    from vivace.store.interface import StoreError

    if isinstance(error, OSError):
        return in_words(error)
    if isinstance(error, (ValueError, NotImplementedError, ServerError, BusyError, VivaceError, StoreError)):
        return str(error)
    return None


def _write_traceback(error: Exception) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="vivace-", suffix=".traceback", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    return file.name


@contextlib.contextmanager
def reported(show_traceback: bool = False) -> Iterator[None]:
    """Expected errors as one line and exit code 1; others too, with the file that holds the traceback. Ctrl-C is exit
    code 130. ``show_traceback``, or VIVACE_TRACEBACK=1: the traceback on the screen before the line."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("stopped")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        if hasattr(error, "exit_code"):  # a usage error: Typer prints it, exit code 2
            raise
        if show_traceback or os.environ.get(TRACEBACK, "") not in ("", "0"):
            errors.print("".join(traceback.format_exception(error)), soft_wrap=True)
        message = expected(error)
        if message is None:
            message = (
                f"{type(error).__name__}: {str(error).strip()}\n"
                f"a fault of vivace itself; traceback in {_write_traceback(error)} ({TRACEBACK}=1 shows it here)"
            )
        errors.print("vivace:", style="red", end=" ")
        errors.print(message, soft_wrap=True)
        raise typer.Exit(1) from None
