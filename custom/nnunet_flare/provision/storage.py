"""Where the server keeps jobs: in its own kit, which survives a restart of the machine."""

from __future__ import annotations

import os
from pathlib import Path

from nvflare.app_common.storages.filesystem_storage import FilesystemStorage

__all__ = ["KitStorage"]


class KitStorage(FilesystemStorage):
    """FLARE's file storage in a folder of the kit; FLARE itself takes absolute paths only, and defaults to ``/tmp``.

    Args:
        root_dir: Relative to the kit's folder, which is where FLARE's processes run. ``nvflare deploy prepare`` knows
            the argument by this name, and puts an absolute path there.
    """

    def __init__(self, root_dir: str = ".") -> None:
        super().__init__(root_dir=str(Path(root_dir).absolute()))

    def _object_path(self, uri: str) -> str:
        """FLARE takes every path as one below ``root_dir``; ``nvflare deploy prepare`` names jobs by absolute paths."""
        place = Path(os.path.realpath(uri))
        inside = Path(uri).is_absolute() and place.is_relative_to(self.root_dir)
        return super()._object_path(str(place.relative_to(self.root_dir)) if inside else uri)
