"""Which case goes to which site, when one data set is split into several."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from nnunet_flare.errors import ConfigError

__all__ = ["Assignment", "FractionAssignment", "TableAssignment", "config_error", "parse_fractions", "parse_spacings"]

T = TypeVar("T")


class Assignment(Protocol):
    """Decides which site gets which case."""

    def assign(self, cases: Collection[str]) -> dict[str, str]:
        """Case -> site, for every case.

        Raises:
            ConfigError: a case has no site, or a site no case.
        """


@dataclass(frozen=True, kw_only=True)
class TableAssignment:
    """Cases go where a CSV file with the header ``case,site`` sends them."""

    file: Path

    def assign(self, cases: Collection[str]) -> dict[str, str]:
        try:
            text = self.file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise config_error("assignment", "a CSV file in UTF-8", "no such file", detail=[str(self.file)]) from error
        header, *rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row] or [[]]
        if header != ["case", "site"]:
            raise config_error("assignment", "the header case,site", ",".join(header) or "an empty file")
        if any(len(row) != 2 or not all(row) for row in rows):
            raise config_error("assignment", "a case and a site in each row", "rows with more or less")
        listed = [case for case, _ in rows]
        twice = {case for case in listed if listed.count(case) > 1}
        for found, wrong in (
            ("cases that are listed twice", twice),
            ("cases that the data set does not have", set(listed) - set(cases)),
            ("cases of the data set that are not listed", set(cases) - set(listed)),
        ):
            if wrong:
                raise config_error("assignment", "each case once", f"{len(wrong)} {found}", detail=wrong)
        return dict(rows)


@dataclass(frozen=True, kw_only=True)
class FractionAssignment:
    """Cases are shuffled and shared out by fractions; the largest remainders round up, so that none is left over.

    Args:
        fractions: Site -> share of the patients, such as ``Fraction(1, 3)``, ``0.2`` or ``"0.2"``; they sum to 1.
        seed: Of the shuffle.
        patient_pattern: Regular expression whose one group is the patient in a case name; all cases of a patient
            go to one site. Without it, each case is a patient.
    """

    fractions: Mapping[str, Fraction | float | str]
    seed: int = 0
    patient_pattern: str | None = None

    def assign(self, cases: Collection[str]) -> dict[str, str]:
        fractions = {site: Fraction(str(value)) for site, value in self.fractions.items()}
        if any(value <= 0 for value in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
            found = " + ".join(str(value) for value in self.fractions.values())
            raise config_error("fractions", "fractions above 0 that sum to 1", found)
        cases_of = self._cases_by_patient(cases)
        patients = np.random.default_rng(self.seed).permutation(sorted(cases_of)).tolist()
        shares = {site: value * len(patients) for site, value in fractions.items()}
        counts = {site: int(share) for site, share in shares.items()}
        by_remainder = sorted(shares, key=lambda site: counts[site] - shares[site])
        for site in by_remainder[: len(patients) - sum(counts.values())]:
            counts[site] += 1
        if empty := [site for site, count in counts.items() if count == 0]:
            found = f"none for {', '.join(empty)} of {len(patients)}"
            raise config_error("fractions", "a patient for each site", found)
        sites = [site for site, count in counts.items() for _ in range(count)]
        return {case: site for patient, site in zip(patients, sites, strict=True) for case in cases_of[patient]}

    def _cases_by_patient(self, cases: Collection[str]) -> dict[str, list[str]]:
        try:
            pattern = re.compile(self.patient_pattern or "(.+)")
        except re.error as error:
            raise config_error("patient_pattern", "a regular expression", str(error)) from error
        if pattern.groups != 1:
            raise config_error("patient_pattern", "one group, the patient", f"{pattern.groups} groups")
        matches = {case: pattern.search(case) for case in sorted(cases)}
        if unmatched := [case for case, match in matches.items() if not (match and match[1])]:
            found = f"{len(unmatched)} of {len(matches)} without"
            raise config_error("patient_pattern", "a patient in each case name", found, detail=unmatched)
        cases_of = defaultdict(list)
        for case, match in matches.items():
            cases_of[match[1]].append(case)
        return cases_of


def parse_fractions(text: str) -> dict[str, Fraction]:
    """Fractions as a user writes them.

    >>> parse_fractions("site-1=0.5,site-2=1/2")
    {'site-1': Fraction(1, 2), 'site-2': Fraction(1, 2)}
    """
    return _parse_sites(text, "fractions", "site-1=0.6,site-2=0.4", Fraction)


def parse_spacings(text: str) -> dict[str, tuple[float, ...]]:
    """Spacings in mm as a user writes them.

    >>> parse_spacings("site-2=1x1x2.5")
    {'site-2': (1.0, 1.0, 2.5)}
    """
    return _parse_sites(text, "spacing", "site-2=1x1x2", lambda value: tuple(map(float, value.split("x"))))


def _parse_sites(text: str, field: str, example: str, parse: Callable[[str], T]) -> dict[str, T]:
    parsed: dict[str, T] = {}
    for item in text.split(","):
        site, separator, value = (part.strip() for part in item.partition("="))
        try:
            parsed_value = parse(value)
        except (ValueError, ZeroDivisionError) as error:
            raise config_error(field, example, repr(item)) from error
        if not separator or not site or site in parsed:
            raise config_error(field, f"each site once, as in {example}", repr(item))
        parsed[site] = parsed_value
    return parsed


def config_error(
    field: str, expected: str, found: str, remedy: str = "correct it", detail: Iterable[str] = ()
) -> ConfigError:
    return ConfigError(
        field=field, expected=expected, found=found, remedy=remedy, local_detail="\n".join(sorted(detail))
    )
