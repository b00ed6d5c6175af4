"""What belongs to the site: where its data lies, which data set it brings, what its machine can do.

The settings are read from ``local/nnunet_flare.json`` of the site's start-up kit (in the simulator: of the
simulator's workspace), else from the file that ``$NNUNET_FLARE_SETTINGS`` names, else from nnU-Net's own environment
variables. A job may name a data set, never a path.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nnunet_flare.errors import ConfigError

__all__ = ["HOME_VARIABLE", "SETTINGS_FILE", "SiteSettings", "state_home"]

SETTINGS_FILE = "nnunet_flare.json"
HOME_VARIABLE = "NNUNET_FLARE_HOME"
SETTINGS_VARIABLE = "NNUNET_FLARE_SETTINGS"
_PATHS = ("home", "nnunet_raw", "nnunet_preprocessed", "pretrained")
ROLES = ("train", "evaluate")
DEVICES = ("auto", "cpu", "cuda", "mps")
_REMARK = "#"
_FINGERPRINT = "(?:[0-9A-Fa-f]{2}:?){32}"


def state_home() -> Path:
    """Folder for everything that must outlive a FLARE job: ``$NNUNET_FLARE_HOME``, else ``~/nnunet_flare``."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / "nnunet_flare").absolute()


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """One site's settings; every path is absolute.

    Args:
        site: FLARE's name of the site.
        home: State of runs, models and preprocessed data: ``<home>/<site>/``.
        nnunet_raw: nnU-Net's raw data folder, holding ``DatasetXXX_Name``.
        nnunet_preprocessed: Folder for preprocessed data; null is ``<home>/<site>/nnUNet_preprocessed``. Only the
            sub-folder ``federated/`` of it is ever written, so that plans made here earlier stay as they are.
        dataset: nnU-Net data set name or id, overruling the job's; ``demo`` is generated.
        role: ``train``, or ``evaluate`` for a site that scores the global model and trains nothing.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        gpu_memory_gb: Memory target of nnU-Net's planner; null is the planner's own.
        num_processes: Processes for fingerprint, preprocessing and validation; 1 works in the training process.
        num_augmentation_processes: Augmentation workers; null is 0 on CPU and nnU-Net's choice on GPU.
        num_threads: Threads of torch; null divides the machine's cores by the clients that run on it.
        plans_overrides: Keys of the trained configuration in the plans to replace, such as ``batch_size``.
        keep_local: Kinds of layers and regular expressions, as in ``SharingConfig``; a job that asks for such a layer
            is refused here, whatever the server says.
        share_model: Let the whole final model of this site, and its plans, travel to the other sites to be scored.
        pretrained: nnU-Net checkpoint that the layers which this site does not share start from.
        peers: Site -> SHA-256 fingerprint of its certificate, of the hospitals that this site shares an encryption key
            with; empty accepts every one that the project's CA certified.
        min_sites_in_sum: Least number of sites in an encrypted sum that is decrypted here, from 2 on. With two, each of
            them can subtract its own part and has the other's.
    """

    site: str
    home: Path = field(default_factory=state_home)
    nnunet_raw: Path | None = None
    nnunet_preprocessed: Path | None = None
    dataset: str | int | None = None
    role: str = "train"
    device: str = "auto"
    gpu_memory_gb: float | None = None
    num_processes: int = 1
    num_augmentation_processes: int | None = None
    num_threads: int | None = None
    plans_overrides: Mapping[str, Any] = field(default_factory=dict)
    pretrained: Path | None = None
    keep_local: Sequence[str] = ()
    share_model: bool = False
    peers: Mapping[str, str] = field(default_factory=dict)
    min_sites_in_sum: int = 3

    def __post_init__(self) -> None:
        for name, value, allowed in (("role", self.role, ROLES), ("device", self.device, DEVICES)):
            if value not in allowed:
                raise self._error(name, f"one of {', '.join(allowed)}", repr(value))
        number = self.gpu_memory_gb
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float) or number <= 0):
            raise self._error("gpu_memory_gb", "a positive number", repr(number))
        least_values = {"num_processes": 1, "num_threads": 1, "num_augmentation_processes": 0, "min_sites_in_sum": 2}
        for name, least in least_values.items():
            value = getattr(self, name)
            optional = name in ("num_threads", "num_augmentation_processes")
            if not ((type(value) is int and value >= least) or (value is None and optional)):
                raise self._error(name, f"a whole number from {least} on", repr(value))
        if isinstance(self.keep_local, str) or not all(isinstance(item, str) and item for item in self.keep_local):
            raise self._error("keep_local", "a list of kinds and regular expressions", repr(self.keep_local))
        if type(self.share_model) is not bool:
            raise self._error("share_model", "true or false", repr(self.share_model))
        if not isinstance(self.plans_overrides, Mapping):
            raise self._error("plans_overrides", "a mapping of plans keys", repr(self.plans_overrides))
        pinned = self.peers if isinstance(self.peers, Mapping) else {"": ""}
        if not all(isinstance(pin, str) and re.fullmatch(_FINGERPRINT, pin) for pin in pinned.values()):
            raise self._error("peers", "site names with SHA-256 fingerprints", repr(self.peers))
        if self.share_model and self.keep_local:
            raise self._error("share_model", "false beside keep_local, for a model travels whole", "true")
        object.__setattr__(self, "keep_local", tuple(self.keep_local))
        if self.dataset is not None and type(self.dataset) not in (int, str):
            raise self._error("dataset", "a data set name or id", repr(self.dataset))

    def _error(self, field_name: str, expected: str, found: str) -> ConfigError:
        return ConfigError(
            field=f"{SETTINGS_FILE}: {field_name}",
            expected=expected,
            found=found,
            remedy="correct the site's settings file",
            site=self.site,
        )

    @property
    def folder(self) -> Path:
        return self.home / self.site

    @property
    def preprocessed_root(self) -> Path:
        return (self.nnunet_preprocessed or self.folder / "nnUNet_preprocessed") / "federated"

    @property
    def raw_root(self) -> Path:
        return self.nnunet_raw or self.folder / "nnUNet_raw"

    @classmethod
    def load(cls, site: str, local: Path | None = None) -> SiteSettings:
        """Read the settings of ``site``; without a file the defaults hold, a wrong key in it is an error.

        A ``sites`` map (site -> settings) in the file overrules the settings around it, for simulated sites that
        share one ``local/`` folder. Keys that begin with ``#`` are remarks, and null is the default.

        Args:
            site: FLARE's name of the site.
            local: The ``local`` folder of its kit.

        Raises:
            ConfigError: the file is named but absent, is no JSON object, or holds an unknown key or a wrong value.
        """
        settings: dict[str, Any] = {}
        file: Path | None = local / SETTINGS_FILE if local else None
        if file is None or not file.is_file():
            file = Path(named) if (named := os.environ.get(SETTINGS_VARIABLE)) else None
        if file is not None:
            try:
                settings = dict(json.loads(file.read_text()))
                settings |= dict(settings.pop("sites", {}).get(site, {}))
                settings = {name: value for name, value in settings.items() if not name.startswith(_REMARK)}
                settings = {name: value for name, value in settings.items() if value is not None}
                for name in _PATHS:
                    if settings.get(name) is not None:
                        settings[name] = str(Path(settings[name]))
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise ConfigError(
                    field=SETTINGS_FILE,
                    expected="a JSON object with sites as objects and paths as text",
                    found=type(error).__name__,
                    local_detail=f"{file}: {error}",
                    remedy="correct the site's settings file",
                    site=site,
                ) from error
        known = {item.name for item in fields(cls)} - {"site"}
        if unknown := sorted(set(settings) - known):
            raise ConfigError(
                field=SETTINGS_FILE,
                expected=f"keys among {', '.join(sorted(known))}",
                found=", ".join(unknown),
                remedy="correct the spelling or remove the key",
                site=site,
            )
        paths = {name: settings[name] for name in _PATHS if settings.get(name)}
        for name, variable in (("nnunet_raw", "nnUNet_raw"), ("nnunet_preprocessed", "nnUNet_preprocessed")):
            if name not in paths and os.environ.get(variable):
                paths[name] = os.environ[variable]
        settings |= {name: Path(path).expanduser().absolute() for name, path in paths.items()}
        return cls(site=site, **settings)

    @classmethod
    def template(cls) -> dict[str, Any]:
        """A settings file with every setting at its default, each under a remark that says what it is."""
        described = re.findall(r"^ {4,8}(\w+): (.+(?:\n {9,}.+)*)", cls.__doc__ or "", re.MULTILINE)
        remarks = {name: " ".join(text.replace("``", "").split()) for name, text in described}
        template: dict[str, Any] = {}
        for item in fields(cls):
            if item.name != "site":
                default = item.default if item.default is not MISSING else None
                template |= {f"{_REMARK} {item.name}": remarks[item.name], item.name: default}
        return template

    def to_json(self) -> dict[str, Any]:
        """JSON form for the site's nnU-Net process; ``from_json`` is its inverse."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SiteSettings:
        paths = {name: Path(values[name]) for name in _PATHS if values[name]}
        return cls(**{**values, **paths})

    def with_dataset(self, dataset: str | int) -> SiteSettings:
        """These settings with the job's data set, unless the site names its own."""
        return self if self.dataset else replace(self, dataset=dataset)
