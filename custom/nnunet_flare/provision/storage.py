"""Where the server keeps jobs: in its own kit, which survives a restart of the machine."""

from __future__ import annotations

from pathlib import Path

from nvflare.app_common.storages.filesystem_storage import FilesystemStorage

__all__ = ["KitStorage"]


class KitStorage(FilesystemStorage):
    """FLARE's file storage in a folder of the kit; FLARE itself takes absolute paths only, and defaults to ``/tmp``.

    Args:
        folder: Relative to the kit's folder, which is where FLARE's processes run.
    """

    def __init__(self, folder: str = ".") -> None:
        super().__init__(root_dir=str(Path(folder).absolute()))
