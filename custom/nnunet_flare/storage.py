"""Files that survive a crash: written whole or not at all, in folders that one process owns at a time."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnunet_flare.errors import StateError

__all__ = ["FolderLock", "read_json", "write_atomically", "write_json"]


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, force it to the disk, then rename it to ``file``.

    Whatever fails on the way (a full disk, a kill), a previous ``file`` stays as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.partial")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(file.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_atomically(file, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def read_json(file: Path) -> dict[str, Any]:
    """Raises StateError: the file is no JSON object."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        content = error
    if not isinstance(content, dict):
        raise StateError(
            field=file.name,
            expected="a JSON object",
            found=type(content).__name__,
            remedy="move the run's folder away; the next submission starts it anew",
            local_detail=f"{file}: {content}",
        )
    return content


class FolderLock:
    """Keeps a folder to one process; the lock goes with the process, however it ends.

    Raises:
        StateError: another process still holds the folder after ``patience`` seconds.
    """

    def __init__(self, folder: Path, *, patience: float = 10.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / ".lock").open("w")
        give_up = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > give_up:
                    self._file.close()
                    raise StateError(
                        field=f"folder of {folder.name}",
                        expected="a run that nobody else works on",
                        found="another process holds its lock",
                        remedy="wait for the other job to end or stop it, or give this run another name",
                        local_detail=str(folder),
                    ) from None
                time.sleep(0.1)

    def release(self) -> None:
        self._file.close()
