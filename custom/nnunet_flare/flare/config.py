"""How the server conducts a run: whom it waits for, and how long. No part of the run's identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nnunet_flare.encryption.vector import RANGES
from nnunet_flare.errors import ConfigError

__all__ = ["EncryptionConfig", "FederationConfig"]


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Participation and deadlines.

    Args:
        min_sites: Sites that must train in every round; None is all that were there at the start.
        round_timeout_s: Deadline of a round; a site that has not answered by then is left out of it.
        cross_site: At the end, score every site's model on every site's validation cases; a site's model travels only
            where its own settings allow it (``share_model``).
        phase_timeout_s: Deadline of each phase before and after the rounds (fingerprint, plan, preprocess, validate).
        num_gpus: What a site's Kubernetes or Slurm is asked for; other sites use the GPU that their settings name.
    """

    min_sites: int | None = None
    round_timeout_s: int = 24 * 3600
    phase_timeout_s: int = 24 * 3600
    cross_site: bool = False
    num_gpus: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            optional = item.name in ("min_sites", "num_gpus") and value is None
            fits = type(value) is bool if item.name == "cross_site" else type(value) is int and value > 0
            if not optional and not fits:
                raise ConfigError(
                    field=item.name,
                    expected="true or false" if item.name == "cross_site" else "a positive integer",
                    found=repr(value),
                    remedy="correct the job's federation settings",
                )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FederationConfig:
        _check_known(cls, "federation", values)
        return cls(**values)

    def changes(self) -> dict[str, Any]:
        """The settings that differ from the defaults: what a job file states."""
        return {name: value for name, value in asdict(self).items() if value != getattr(FederationConfig(), name)}


@dataclass(frozen=True, kw_only=True)
class EncryptionConfig:
    """How sums are encrypted.

    Args:
        key_holder: The hospital that makes the key; None is the first in alphabetical order that trains.
        max_abs_weight: Weights beyond it are clipped: 4, or 8 at half the precision.
    """

    key_holder: str | None = None
    max_abs_weight: float = RANGES[0]

    def __post_init__(self) -> None:
        rules = {
            "key_holder": (self.key_holder is None or isinstance(self.key_holder, str), "the name of a site"),
            "max_abs_weight": (self.max_abs_weight in RANGES, f"one of {', '.join(map(str, RANGES))}"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ConfigError(
                    field=f"encryption: {name}",
                    expected=expected,
                    found=repr(getattr(self, name)),
                    remedy="correct the job's encryption settings",
                )
        object.__setattr__(self, "max_abs_weight", float(self.max_abs_weight))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EncryptionConfig:
        _check_known(cls, "encryption", values)
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _check_known(kind: type, what: str, values: Mapping[str, Any]) -> None:
    known = {item.name for item in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(
            field=f"{what} settings",
            expected=f"settings among {', '.join(sorted(known))}",
            found=", ".join(unknown),
            remedy="correct the spelling in the job",
        )
