"""Plans from nnU-Net's own planner for a given fingerprint."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nnunet_flare.errors import PlansError
from nnunet_flare.fingerprint.summary import FingerprintSummary
from nnunet_flare.nnunet.dataset import RawDataset
from nnunet_flare.nnunet.network_plan import check_classes
from nnunet_flare.nnunet.schema import dataset_json

__all__ = ["plan"]

_OVERRIDABLE = ("batch_size", "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm", "batch_dice")
_ARCHITECTURE = "architecture.arch_kwargs."


def plan(
    raw_dataset_folder: Path,
    fingerprint: FingerprintSummary | Mapping[str, Any],
    *,
    num_training: int,
    planner: str = "ExperimentPlanner",
    gpu_memory_gb: float | None = None,
    configuration: str,
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Let nnU-Net's unmodified planner make the plans, in a scratch folder.

    Not for use beside other threads: environment variables and standard output are redirected meanwhile.

    Args:
        raw_dataset_folder: ``DatasetXXX_Name``; its channels, labels and first image's format are read.
        fingerprint: A summary, or the content of nnU-Net's ``dataset_fingerprint.json``.
        num_training: Training cases that the fingerprint speaks for; the planner caps the batch size by it.
        planner: Planner class, by nnU-Net's own lookup.
        gpu_memory_gb: Memory target; None is the planner's own.
        configuration: The configuration that is to be trained.
        overrides: Keys of that configuration to replace, ``architecture.arch_kwargs.<name>`` among them.

    Returns:
        The content of nnU-Net's plans file.

    Raises:
        DatasetError: the data set cannot be used, or the fingerprint has no foreground.
        PlansError: planner or configuration is unknown, or an override does not fit.
    """
    import torch
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

    planner_class = _find_class("experiment_planning", planner)
    if not (isinstance(planner_class, type) and issubclass(planner_class, ExperimentPlanner)):
        raise _error("planner", "a planner class of the installed nnU-Net", planner, "correct the name")
    dataset, name = RawDataset.read(raw_dataset_folder), raw_dataset_folder.name
    cases = {
        case: {"images": list(map(str, files.images)), "label": str(files.label)}
        for case, files in dataset.cases.items()
    }
    if isinstance(fingerprint, FingerprintSummary):
        fingerprint = fingerprint.to_nnunet()
    num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as scratch:
        raw, preprocessed = Path(scratch, "raw"), Path(scratch, "preprocessed")
        _write(raw / name / "dataset.json", dataset_json(dataset.schema, num_training) | {"dataset": cases})
        _write(preprocessed / name / "dataset_fingerprint.json", fingerprint)
        # with nnUNet_n_proc_DA=0, the planner would ask torch for 0 threads
        environment = {"nnUNet_raw": raw, "nnUNet_preprocessed": preprocessed, "nnUNet_n_proc_DA": 1}
        with _environment(environment), contextlib.redirect_stdout(io.StringIO()):
            try:
                plans, _ = plan_experiment_dataset(name, planner_class, gpu_memory_gb)
            finally:
                torch.set_num_threads(num_threads)
    result: dict[str, Any] = json.loads(json.dumps(plans))  # tuples become lists, as in nnU-Net's file
    _check_configuration(result, configuration)
    _override(result["configurations"][configuration], overrides)
    check_classes(result, configuration)
    return result


def _check_configuration(plans: Mapping[str, Any], configuration: str) -> None:
    configurations = plans["configurations"]
    usable = [name for name, settings in configurations.items() if not settings.get("previous_stage")]
    if configuration in usable:
        return
    if configuration in configurations or configuration == "3d_cascade_fullres":
        expected = f"one of {', '.join(usable)}: a cascade needs predictions of its previous stage at every site"
    else:
        expected = f"one of {', '.join(usable)}, which nnU-Net planned for this data"
    raise _error("configuration", expected, configuration, "choose one of these")


def _override(settings: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Replace values in a configuration, each by one of its own kind."""
    architecture = settings["architecture"]["arch_kwargs"]
    parts = dict.fromkeys(_OVERRIDABLE, settings) | {_ARCHITECTURE + name: architecture for name in architecture}
    for key, value in overrides.items():
        if key not in parts:
            raise _error(f"plans_overrides: {key}", f"one of {', '.join(parts)}", key, "correct or remove the key")
        part, name = parts[key], key.removeprefix(_ARCHITECTURE)
        if not _fits(value, part[name]):
            raise _error(f"plans_overrides: {key}", f"a value like {part[name]!r}", repr(value), "correct the value")
        part[name] = value
    unknown = [
        name for name in settings["normalization_schemes"] if _find_class("preprocessing/normalization", name) is None
    ]
    if unknown:
        raise _error("plans_overrides: normalization_schemes", "nnU-Net's", ", ".join(unknown), "correct the name")
    steps = [
        math.prod(stride[axis] for stride in architecture["strides"]) for axis in range(len(settings["patch_size"]))
    ]
    if any(size % step for size, step in zip(settings["patch_size"], steps, strict=True)):
        raise _error(
            "plans_overrides: patch_size",
            f"multiples of {steps}, the product of the network's strides",
            repr(settings["patch_size"]),
            "choose a multiple along each axis",
        )


def _fits(value: Any, planned: Any) -> bool:
    """Is ``value`` of the JSON type and length of ``planned``, and positive where that is a number?"""
    match planned:
        case None:
            return True
        case list():
            return type(value) is list and len(value) == len(planned) and all(map(_fits, value, planned))
        case bool() | str() | dict():
            return type(value) is type(planned)
        case int():
            return type(value) is int and value > 0
        case _:
            return type(value) in (int, float) and 0 < value < math.inf


def _find_class(package: str, name: str) -> Any:
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0], package)
    return recursive_find_python_class(str(folder), name, f"nnunetv2.{package.replace('/', '.')}")


@contextlib.contextmanager
def _environment(values: Mapping[str, object]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))


def _error(field: str, expected: str, found: str, remedy: str) -> PlansError:
    return PlansError(field=field, expected=expected, found=found, remedy=remedy)
