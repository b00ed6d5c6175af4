"""The folder of a run, at the server and at each site: what makes a run continue behind its last finished phase.

``<home>/<who>/runs/<name>/run.json`` says which run this is. An unfinished run of the same name continues; a finished
one is moved to ``runs/archive/`` and a new one starts, unless a job of the same series asks for it once more. One that
got no weights yet and whose settings change is archived too; an unfinished one with weights refuses other settings.
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import ConfigError, StateError
from nnunet_flare.storage import FolderLock, read_json, write_atomically, write_json

__all__ = ["KEY_FOLDER", "RunFolder", "check_run_name", "read_arrays", "write_arrays"]

KEY_FOLDER = "encryption"
"""Where a site keeps its sealed key of an encrypted run."""
_MANIFEST = "run.json"
_MANIFEST_KEYS = {"run_id": str, "finished": bool, "settings": dict}
_GLOBAL = re.compile(r"global_(\d+)\.npz")
_KEPT_GLOBALS = 2


def check_run_name(name: object) -> None:
    """Raises ConfigError: no plain folder name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name) or name == "archive":
        raise ConfigError(
            field="run",
            expected="letters, digits, dot, dash and underscore",
            found=repr(name),
            remedy="give the run another name",
        )


class RunFolder:
    """One run's folder, locked while this object lives.

    Args:
        parent: Folder of the server or the site, ``<home>/<who>``.
        name: Name of the run; letters, digits, dot, dash and underscore.
    """

    def __init__(self, parent: Path, name: str) -> None:
        check_run_name(name)
        self.path = self.fold_path = parent / "runs" / name
        self._lock = FolderLock(parent / "runs" / ".locks" / name)

    def close(self) -> None:
        self._lock.release()

    def begin(self, settings: Mapping[str, Any], series: str = "") -> str:
        """Server: continue the unfinished run, or start a new one; one that has no weights yet may change its mind.

        Args:
            settings: Of the run.
            series: Of the job; a finished run is taken up again for a job of the series that it began or went on with.

        Returns:
            The run's id.

        Raises:
            ConfigError: an unfinished run of this name has weights, and other settings.
        """
        manifest = self._manifest()
        if manifest and manifest["settings"] == settings:
            is_of_series = bool(series) and manifest.get("series") == series
            if is_of_series:
                return manifest["run_id"]
            if not manifest["finished"]:
                write_json(self.path / _MANIFEST, manifest | {"series": series})
                return manifest["run_id"]
        elif manifest and not manifest["finished"] and self.has_weights():
            self._refuse_other_settings(manifest["settings"], settings)
        return self._start(uuid.uuid4().hex, settings, series)

    def follow(self, run_id: str, settings: Mapping[str, Any]) -> None:
        """Site: continue the server's run, or start it; another run of this name is archived, never lost."""
        manifest = self._manifest()
        if not manifest or manifest["run_id"] != run_id:
            self._start(run_id, settings)

    def finish(self) -> None:
        write_json(self.path / _MANIFEST, self._manifest() | {"finished": True})

    def _manifest(self) -> dict[str, Any]:
        file = self.path / _MANIFEST
        if not file.exists():
            return {}
        manifest = read_json(file)
        if not all(isinstance(manifest.get(key), kind) for key, kind in _MANIFEST_KEYS.items()):
            raise StateError(
                field=_MANIFEST,
                expected=f"the keys {', '.join(_MANIFEST_KEYS)}",
                found=", ".join(manifest) or "none",
                remedy="move the run's folder away; the next submission starts it anew",
                local_detail=str(file),
            )
        return manifest

    def _start(self, run_id: str, settings: Mapping[str, Any], series: str = "") -> str:
        if self.path.exists():
            stamp = time.strftime("%Y%m%d-%H%M%S")
            archive = self.path.parent / "archive" / f"{self.path.name}-{stamp}-{uuid.uuid4().hex[:4]}"
            archive.parent.mkdir(exist_ok=True)
            shutil.rmtree(self.path / KEY_FOLDER, ignore_errors=True)  # nobody continues an archived run
            self.path.rename(archive)
        content = {"run_id": run_id, "series": series, "finished": False, "settings": dict(settings)}
        write_json(self.path / _MANIFEST, content)
        return run_id

    def _refuse_other_settings(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        raise ConfigError(
            field=f"run {self.path.name}: {', '.join(differing)}",
            expected="the settings of the unfinished run: " + ", ".join(f"{k}={before.get(k)}" for k in differing),
            found=", ".join(f"{key}={now.get(key)}" for key in differing),
            remedy="submit the run with its old settings to finish it, or give the new one another run name",
            site="server",
        )

    def enter_fold(self, fold: int | str) -> None:
        """Keep what belongs to one fold of several in a folder of its own."""
        self.fold_path = self.path / f"fold_{fold}"

    def has_weights(self) -> bool:
        """True if the run, or a fold of it, has begun to train."""
        return any(self.path.glob("state/global_*.npz")) or any(self.path.glob("fold_*/state/global_*.npz"))

    def newest_globals(self) -> list[Path]:
        """The newest file of weights of the run, or of each of its folds."""
        files = (_global_files(folder) for folder in (self.path, *self.path.glob("fold_*")))
        return [of_fold[-1] for of_fold in files if of_fold]

    def save_global(self, round_number: int, layers: Mapping[str, np.ndarray]) -> None:
        """Keep the weights that round ``round_number`` starts from; the two newest files stay."""
        write_arrays(self.fold_path / "state" / f"global_{round_number:05d}.npz", layers)
        for old in _global_files(self.fold_path)[:-_KEPT_GLOBALS]:
            old.unlink()

    def load_global(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """The newest weights and the round that starts from them, or None before the first.

        Raises:
            StateError: the newest file is damaged.
        """
        files = _global_files(self.fold_path)
        if not files:
            return None
        return int(_GLOBAL.fullmatch(files[-1].name)[1]), read_arrays(files[-1])


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    def write(draft: Path) -> None:
        with draft.open("wb") as handle:
            np.savez(handle, **arrays)

    write_atomically(file, write)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Raises StateError: the file is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise StateError(
            field=file.name,
            expected="the arrays that this run has written",
            found=type(error).__name__,
            remedy="remove the file; the run then continues from the step before",
            local_detail=f"{file}: {error}",
        ) from error


def _global_files(folder: Path) -> list[Path]:
    return sorted(file for file in (folder / "state").glob("global_*.npz") if _GLOBAL.fullmatch(file.name))
