"""What a job says of the training: the same for every site, and part of the run's identity."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from nnunet_flare.errors import ConfigError

__all__ = ["TrainingConfig"]

STAGES = ("fingerprint", "plan", "preprocess")


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _patterns(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(map(_text, value)):
        return False
    try:
        return all(map(re.compile, value))
    except (re.error, OverflowError, RecursionError):
        return False


def _one_of(*allowed: object) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in allowed, "one of " + ", ".join(map(str, allowed))


def _fold(value: Any) -> bool:
    return value == "all" or (type(value) is int and value >= 0)


def _folds(value: Any) -> bool:
    several = isinstance(value, list | tuple) and bool(value) and len({*map(str, value)}) == len(value)
    return _fold(value) or (several and all(map(_fold, value)))


_FOLD = (_folds, "0, 1, 2 ..., 'all', or a list of different ones")
_COUNT = (_positive, "a positive integer")
_OPTIONAL_COUNT = (lambda value: value is None or _positive(value), "a positive integer, or nothing")
_NAME = (_text, "a name")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a federated nnU-Net training, with nnU-Net's own names where it has one.

    Args:
        dataset: nnU-Net name or id of the data set at every site; ``demo`` is generated. A site may name its own.
        configuration: ``2d``, ``3d_fullres`` or ``3d_lowres``.
        planner: Planner class, by nnU-Net's own lookup.
        trainer: Trainer class, by nnU-Net's own lookup.
        fold: Fold of the site's own cross-validation split, or ``all``; a list trains one after the other.
        num_rounds: Rounds of local training and averaging.
        epochs_per_round: Local epochs in a round; the learning rate falls over all epochs of all rounds.
        iterations_per_epoch: None is the trainer's own (250).
        val_iterations_per_epoch: None is the trainer's own (50).
        seed: Decides the common initial weights and, with site and round, the augmentation.
        pretrained: File in ``<home>/pretrained/`` of the server whose weights replace the random ones.
        weighting: ``cases`` weighs a site by its training cases, ``uniform`` weighs all sites equally.
        momentum: ``keep`` the optimizer's momentum over rounds, or ``reset`` it at each round's start.
        prox_mu: Strength of FedProx: the local loss gains ``prox_mu / 2 * |w - w_received|^2`` over the layers received
            in the round (``local_objective.proximal_term``). 0 is plain federated averaging.
        freeze: Regular expressions; the parameters in whose layer name one is found (``re.search``) are never trained,
            such as ``^encoder\\.`` of a pretrained network. Running statistics of a batch norm are not parameters.
        finetune_epochs: Epochs that each training site goes on for itself after the last round, at a small constant
            learning rate (``stepper.FINETUNE_RATE``) and without the pull of ``prox_mu``. The site's model and its
            validation are then those of its own, personalised network; the global model is scored there before.
        update: Sites send the ``difference`` to the weights they received, or their ``weights``.
        wire_dtype: ``float32`` or ``float16`` for layers on the wire.
        plans_overrides: Keys of the configuration in the plans to replace at every site, such as ``batch_size``.
        num_foreground_voxels: Foreground voxels sampled from the whole federation for intensity statistics.
        nsd_tolerance_mm: Tolerance of the normalised surface Dice.
        stop_after: End the job after ``fingerprint``, ``plan`` or ``preprocess``.
    """

    dataset: str | int = "demo"
    configuration: str = "3d_fullres"
    planner: str = "ExperimentPlanner"
    trainer: str = "nnUNetTrainer"
    fold: int | str | Sequence[int | str] = 0
    num_rounds: int = 100
    epochs_per_round: int = 1
    iterations_per_epoch: int | None = None
    val_iterations_per_epoch: int | None = None
    seed: int = 0
    pretrained: str | None = None
    weighting: str = "cases"
    momentum: str = "keep"
    prox_mu: float = 0.0
    freeze: Sequence[str] = ()
    finetune_epochs: int = 0
    update: str = "difference"
    wire_dtype: str = "float32"
    plans_overrides: Mapping[str, Any] = field(default_factory=dict)
    num_foreground_voxels: int = 100_000_000
    nsd_tolerance_mm: float = 2.0
    stop_after: str | None = None

    def __post_init__(self) -> None:
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "dataset": (
                lambda value: (_text(value) and "/" not in value) or _positive(value),
                "a data set name or id, never a path",
            ),
            "configuration": _NAME,
            "planner": _NAME,
            "trainer": _NAME,
            "fold": _FOLD,
            "num_rounds": _COUNT,
            "epochs_per_round": _COUNT,
            "iterations_per_epoch": _OPTIONAL_COUNT,
            "val_iterations_per_epoch": _OPTIONAL_COUNT,
            "seed": (lambda value: type(value) is int, "an integer"),
            "pretrained": (lambda value: value is None or (_text(value) and "/" not in value), "a file name"),
            "weighting": _one_of("cases", "uniform"),
            "momentum": _one_of("keep", "reset"),
            "prox_mu": (
                lambda value: type(value) in (int, float) and 0 <= value < math.inf,
                "a number that is not negative",
            ),
            "freeze": (_patterns, "a list of regular expressions"),
            "finetune_epochs": (lambda value: type(value) is int and value >= 0, "0, 1, 2 ..."),
            "update": _one_of("difference", "weights"),
            "wire_dtype": _one_of("float32", "float16"),
            "plans_overrides": (lambda value: isinstance(value, Mapping), "a mapping of plans keys"),
            "num_foreground_voxels": _COUNT,
            "nsd_tolerance_mm": (
                lambda value: type(value) in (int, float) and 0 < value < math.inf,
                "a positive number of mm",
            ),
            "stop_after": _one_of(None, *STAGES),
        }
        for name, (holds, expected) in rules.items():
            if not holds(value := getattr(self, name)):
                raise ConfigError(field=name, expected=expected, found=repr(value), remedy="correct the job's settings")
        object.__setattr__(self, "freeze", tuple(self.freeze))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Raises ConfigError for a setting that does not exist."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(
                field="training settings",
                expected=f"settings among {', '.join(sorted(known))}",
                found=", ".join(unknown),
                remedy="correct the spelling in the job",
            )
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"plans_overrides": dict(self.plans_overrides), "freeze": list(self.freeze)}

    @property
    def folds(self) -> tuple[int | str, ...]:
        return tuple(self.fold) if isinstance(self.fold, list | tuple) else (self.fold,)

    def of_fold(self, fold: int | str) -> TrainingConfig:
        """These settings for one of the folds: what a site is asked to do."""
        return replace(self, fold=fold)

    def changes(self) -> dict[str, Any]:
        """The settings that differ from the defaults: what a job file states."""
        defaults = TrainingConfig().to_json()
        return {name: value for name, value in self.to_json().items() if value != defaults[name]}
