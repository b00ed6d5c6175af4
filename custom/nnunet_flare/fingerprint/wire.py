"""Checks on the values of a summary that came over the wire."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from nnunet_flare.errors import UpdateError

__all__ = ["filled_list", "finite_number", "fraction", "kind", "object_with", "refusal"]

_FRACTION = re.compile(r"-?\d{1,700}/\d{1,700}")
_LARGEST = 2**1000


def refusal(name: str, expected: str, found: str) -> UpdateError:
    return UpdateError(
        field=f"fingerprint: {name}",
        expected=expected,
        found=found,
        remedy="run the same version of nnunet-flare with the same job at every site",
    )


def kind(value: object) -> str:
    return repr(value) if isinstance(value, int | float) else type(value).__name__


def object_with(sent: object, name: str, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(sent, Mapping) or set(sent) != keys:
        raise refusal(name, f"an object with the keys {', '.join(sorted(keys))}", "another")
    return sent


def filled_list(sent: object, name: str) -> list[Any]:
    if not isinstance(sent, list) or not sent:
        raise refusal(name, "a list with at least one entry", "another value")
    return sent


def finite_number(sent: object, name: str) -> float:
    if type(sent) not in (int, float) or not -_LARGEST < sent < _LARGEST:  # type: ignore[operator]
        raise refusal(name, "a finite number", kind(sent))
    return float(sent)  # type: ignore[arg-type]


def fraction(sent: object, name: str) -> Fraction:
    # the pattern keeps out 1e999999999, which Fraction would write out in full
    if not isinstance(sent, str) or not _FRACTION.fullmatch(sent) or not int(sent.partition("/")[2]):
        raise refusal(name, "a fraction such as 3/4", kind(sent))
    value = Fraction(sent)
    if abs(value) > _LARGEST:
        raise refusal(name, "a fraction in the range of a float", "a larger one")
    return value
