"""What a job may bring to a site: its two configurations, which name listed classes only.

FLARE looks for code in ``custom/`` alone. Yet its processes read any ``comm_config.json`` and ``resources.json`` that
they find under a job's folder, and import every module of the folder that the former names, so a job without
``custom/`` could still run code. Whatever is not known here is refused before the job starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvflare.apis.app_validation import AppValidator
from nvflare.apis.fl_constant import JobConstants
from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE

from nnunet_flare.errors import PolicyError
from nnunet_flare.provision.policy import SitePolicy

__all__ = ["ApplicationValidator"]

_CONFIG = "config"
_CONFIG_FILES = (JobConstants.SERVER_JOB_CONFIG, JobConstants.CLIENT_JOB_CONFIG)
_SIGNATURE_FILES = {NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE}
_CLASS_KEYS = ("path", "class_path", "name")


class ApplicationValidator(AppValidator):
    """Refuses a job's app at its deployment; the submitter finds the reason in the job's meta (``job_deploy_detail``).

    Args:
        server: True for the server, False for a hospital.
    """

    def __init__(self, server: bool = False) -> None:
        self._config_file = JobConstants.SERVER_JOB_CONFIG if server else JobConstants.CLIENT_JOB_CONFIG
        self._allowed = SitePolicy(server=server).allowed_classes

    def validate(self, app_folder: str) -> tuple[str, dict[str, Any]]:
        try:
            self._check(Path(app_folder))
        except PolicyError as error:
            return str(error), {}
        except Exception as error:  # what cannot be looked at is refused
            return f"job: cannot be checked ({type(error).__name__})", {}
        return "", {}

    def _check(self, app: Path) -> None:
        allowed = {_CONFIG, *(f"{_CONFIG}/{name}" for name in _CONFIG_FILES)}
        found = {path.relative_to(app).as_posix() for path in app.rglob("*") if path.name not in _SIGNATURE_FILES}
        if extra := sorted(found - allowed):
            raise PolicyError(
                field="job",
                expected=f"{' and '.join(_CONFIG_FILES)} alone, no code (BYOC) and no other files",
                found=", ".join(extra),
                remedy="submit the job with nnunet-flare submit, or remove these files",
            )
        try:
            config = json.loads((app / _CONFIG / self._config_file).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            config = type(error).__name__
        if not isinstance(config, dict):
            raise PolicyError(
                field=self._config_file, expected="a JSON object", found=str(config), remedy="export the job again"
            )
        foreign = sorted({*map(str, _classes(config))} - {*self._allowed})
        if foreign:
            raise PolicyError(
                field=self._config_file,
                expected=f"classes among {', '.join(self._allowed)}",
                found=", ".join(foreign),
                remedy="this site runs the jobs of nnunet-flare only",
            )


def _classes(config: Any) -> Iterator[Any]:
    """What each object in a configuration would have FLARE build."""
    if isinstance(config, dict):
        yield from (config[key] for key in _CLASS_KEYS if key in config)
    values = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    for value in values:
        yield from _classes(value)
