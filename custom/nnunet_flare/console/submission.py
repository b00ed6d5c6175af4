"""A job folder, checked before anything is sent: it must be what a recipe of this package exports, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare.errors import ConfigError
from nnunet_flare.flare.asym import AsymFedAvgController
from nnunet_flare.flare.config import FederationConfig
from nnunet_flare.flare.controller import FederatedTraining
from nnunet_flare.flare.ffe import FFEController
from nnunet_flare.flare.run import check_run_name
from nnunet_flare.recipe import FederatedTrainingRecipe

__all__ = ["PreparedJob", "prepare_job", "read_controller"]

_CONTROLLERS = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in (FFEController, AsymFedAvgController)}
_SERVER_FILE = Path("app", "config", "config_fed_server.json")
_MARKER = Path("app", "custom", "README")
_NOTHING = object()
_REMEDY = "export the job anew with nnunet-flare job or a recipe, and change its settings there"


@dataclass(frozen=True, kw_only=True)
class PreparedJob:
    """A job that may be sent.

    Args:
        run: Its name, and its run's.
        folder: The job folder, without the marker that lets FLARE's simulator load the package.
        min_sites: As in ``FederationConfig``.
    """

    run: str
    folder: Path
    min_sites: int | None = None


def prepare_job(job: Path, workspace: Path) -> PreparedJob:
    """Rebuild a job from its controller's settings in ``workspace``, and refuse it unless the two are equal.

    A recipe writes every file of its jobs, so that an additional component, filter, workflow or file, and a changed
    class or argument, show as a difference. What is sent is the rebuilt folder.

    Raises:
        ConfigError: no job of this package, a setting that does not exist, or a difference; names file and key.
    """
    controller = read_controller(job)
    federation = FederationConfig.from_json(controller.federation or {})
    FederatedTrainingRecipe(controller.run, controller, federation).export(str(workspace))
    folder = workspace.absolute() / controller.run
    _check_equal(job, folder)
    shutil.rmtree(folder / _MARKER.parent)
    return PreparedJob(run=controller.run, folder=folder, min_sites=federation.min_sites)


def read_controller(job: Path) -> FederatedTraining:
    """The controller that a job folder configures, with its settings checked.

    Raises:
        ConfigError: the folder holds no such job, or a setting is unknown or out of range.
    """
    server = _read_json(job / _SERVER_FILE)
    try:
        (workflow,) = server["workflows"]
        path, settings = workflow["path"], dict(workflow["args"])
    except (KeyError, TypeError, ValueError) as error:
        raise _refusal(f"{_SERVER_FILE}: workflows", "one controller with its args", "something else") from error
    if path not in _CONTROLLERS:
        raise _refusal(f"{_SERVER_FILE}: workflows.0.path", f"one of {', '.join(_CONTROLLERS)}", repr(path))
    try:
        controller = _CONTROLLERS[path](**settings)
    except TypeError as error:
        raise _refusal(f"{_SERVER_FILE}: workflows.0.args", "the controller's settings", str(error)) from error
    check_run_name(controller.run)
    return controller


def _check_equal(job: Path, exported: Path) -> None:
    theirs, ours = (_files(folder) for folder in (job, exported))
    for file in sorted((theirs ^ ours) - {_MARKER}):
        kind = "no code but that of the package" if file.is_relative_to(_MARKER.parent) else "the files of a recipe"
        raise _refusal(str(file), kind, "an additional file" if file in theirs else "no such file")
    for file in sorted(ours - {_MARKER}):
        for key, found, expected in _differences(_read_json(job / file), _read_json(exported / file)):
            raise _refusal(f"{file}: {key}", expected, found)


def _files(folder: Path) -> set[Path]:
    return {file.relative_to(folder) for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()}


def _differences(theirs: Any, ours: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted key, their value and ours, of every difference; a key that one lacks counts as nothing."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for name in sorted(theirs.keys() | ours.keys()):
            yield from _differences(theirs.get(name, _NOTHING), ours.get(name, _NOTHING), f"{key}.{name}")
    elif isinstance(theirs, list) and isinstance(ours, list):
        for index in range(max(len(theirs), len(ours))):
            items = (values[index] if index < len(values) else _NOTHING for values in (theirs, ours))
            yield from _differences(*items, f"{key}.{index}")
    elif type(theirs) is not type(ours) or theirs != ours:
        yield key.lstrip("."), _text(theirs), _text(ours)


def _text(value: Any) -> str:
    return "nothing" if value is _NOTHING else json.dumps(value)[:200]


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise _refusal(file.name, "the file of an exported job", type(error).__name__, str(error)) from error
    if not isinstance(content, Mapping):
        raise _refusal(file.name, "a JSON object", type(content).__name__)
    return content


def _refusal(field: str, expected: str, found: str, local_detail: str = "") -> ConfigError:
    return ConfigError(field=f"job: {field}", expected=expected, found=found, remedy=_REMEDY, local_detail=local_detail)
