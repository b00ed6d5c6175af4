"""The start-up kit of an administrator: whose it is, and where the server is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nnunet_flare.errors import ConfigError

__all__ = ["AdminKit"]

_FILE = Path("startup") / "fed_admin.json"


@dataclass(frozen=True, kw_only=True)
class AdminKit:
    """What is needed of a kit to open a session; ``folder`` is absolute."""

    folder: Path
    user: str
    host: str
    port: int

    @classmethod
    def read(cls, folder: Path) -> AdminKit:
        """Raises ConfigError: the folder is no administrator's kit."""
        try:
            admin = json.loads((folder / _FILE).read_text())["admin"]
            return cls(folder=folder.absolute(), user=admin["username"], host=admin["host"], port=int(admin["port"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                field="kit",
                expected=f"the start-up kit of an administrator, with {_FILE}",
                found=type(error).__name__,
                remedy="name the folder that provisioning made for you, such as prod_00/lead@hospital.org",
                local_detail=f"{folder}: {error}",
            ) from error
