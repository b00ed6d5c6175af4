"""Encrypted values at the server, which adds what it cannot read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_flare.aggregation.layers import Layers
from nnunet_flare.aggregation.sharing import Sharing
from nnunet_flare.encryption.bfv import record_bytes
from nnunet_flare.encryption.vector import EncryptedSum, EncryptedVector, VectorLayout
from nnunet_flare.errors import EncryptionError
from nnunet_flare.flare.protocol import Message
from nnunet_flare.flare.rounds import SiteShare
from nnunet_flare.flare.run_key import RunKey

__all__ = ["Cohort", "EncryptedAverage", "EncryptedVectors", "cohorts_of"]

_LAYOUT = "layout"
_HEADER_BYTES = 1 << 16


class EncryptedVectors:
    """Encrypted sums among the server's values: ``<group>/header``, ``<group>/00000`` and so on, ``<group>/layout``.

    A sum keeps the layout that it was made with; the next one may be of more sites.

    Args:
        layouts: Group -> what its vectors hold.
        key: Of the run.
    """

    def __init__(self, layouts: Mapping[str, VectorLayout], key: RunKey) -> None:
        self.layouts, self._key = layouts, key

    def request(self, group: str, values: Layers) -> tuple[dict[str, Any], Layers]:
        """What a site is told of a group, and its sum if there is one."""
        told = {"layout": self.layouts[group].to_json(), "sum": None}
        arrays = {name: array for name, array in values.items() if name.startswith(f"{group}/")}
        if arrays:
            told["sum"] = json.loads(arrays.pop(f"{group}/{_LAYOUT}").tobytes())
        return told, arrays

    def most_bytes(self, group: str) -> int:
        return record_bytes(1) * sum(self.layouts[group].chunk_lengths(self._key.parameters)) + _HEADER_BYTES

    def begin(self, round_number: int) -> None:
        self._round = round_number
        self._sums = {
            group: EncryptedSum(layout, key_id=self._key.id, parameters=self._key.parameters, round_number=round_number)
            for group, layout in self.layouts.items()
        }

    def add(self, site: str, groups: tuple[str, ...], arrays: Layers) -> None:
        """Check all vectors of a site's reply, then add them.

        Raises:
            EncryptionError: they are not one for each of its groups.
        """
        parts: dict[str, dict[str, Any]] = {group: {} for group in groups}
        for name, array in arrays.items():
            group, _, part = name.partition("/")
            if group not in parts:
                raise EncryptionError(
                    field="reply",
                    expected="encrypted vectors of the site's groups and nothing else",
                    found="something else",
                    remedy="give the job its encryption filters, as jobs/ffe_he has them",
                    site=site,
                )
            parts[group][part] = array
        vectors = {group: EncryptedVector.from_arrays(part, site=site) for group, part in parts.items()}
        for group, vector in vectors.items():
            self._sums[group].check(vector, site=site)
        for group, vector in vectors.items():
            self._sums[group].add(vector, site=site)

    def finish(self, min_sites: int) -> dict[str, dict[str, np.ndarray]]:
        """Group -> arrays of its new sum, for every group with vectors of so many sites."""
        results = {}
        for group, total in self._sums.items():
            if len(total.sites) >= min_sites:
                told = {"layout": self.layouts[group].to_json(), "round": self._round}
                arrays = total.result().to_arrays()
                arrays[_LAYOUT] = np.frombuffer(json.dumps(told).encode(), np.uint8)
                results[group] = {f"{group}/{name}": array for name, array in arrays.items()}
        return results


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Sites that share the same layers, which make one vector.

    Args:
        sites: Who trains them.
        names: Layer at its sites -> name of its value at the server, while that is plain.
        shapes: Layer -> shape.
    """

    sites: tuple[str, ...]
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def id(self) -> str:
        """Stays the same when a site joins."""
        return hashlib.sha256("\n".join(sorted(self.names.values())).encode()).hexdigest()[:12]


def cohorts_of(sharing: Sharing) -> list[Cohort]:
    """The shared layers by the group of sites that shares them."""
    grouped: dict[tuple[str, ...], dict[str, str]] = {}
    for block in sharing.blocks:
        grouped.setdefault(block.sites, {}).update(block.server_names())
    return [
        Cohort(
            sites=sites, names=names, shapes={name: sharing.networks[sites[0]][name].shape for name in sorted(names)}
        )
        for sites, names in grouped.items()
        if names
    ]


class EncryptedAverage:
    """Weighted mean of layers that the server cannot read (``Aggregation``): one vector for each cohort.

    Args:
        cohorts: Groups of sites with their layers.
        shares: Site -> its part.
        scope: Of this run and fold.
        max_abs: Weights beyond it are clipped.
        min_cohort: Vectors that a cohort needs in a round; with fewer its layers keep their values.
        key: Of the run.
    """

    def __init__(
        self,
        cohorts: list[Cohort],
        shares: Mapping[str, SiteShare],
        *,
        scope: str,
        max_abs: float,
        min_cohort: int,
        key: RunKey,
    ) -> None:
        self._shares, self._min_cohort = shares, min_cohort
        self._cohorts = {cohort.id: cohort for cohort in cohorts}
        layouts = {
            name: VectorLayout(
                scope=f"{scope}/{name}",
                shapes=cohort.shapes,
                weights={site: shares[site].weight for site in cohort.sites if site in shares},
                max_abs=max_abs,
            )
            for name, cohort in self._cohorts.items()
        }
        self._vectors = EncryptedVectors(layouts, key)

    def _groups(self, site: str) -> tuple[str, ...]:
        held = set(self._shares[site].names.values())
        return tuple(name for name, cohort in self._cohorts.items() if held.issuperset(cohort.names.values()))

    def on_the_wire(self, values: Layers) -> Layers:
        return values

    def request(self, site: str, content: Mapping[str, Any], values: Layers) -> Message:
        told, layers = {}, {}
        for group in self._groups(site):
            told[group], arrays = self._vectors.request(group, values)
            names = self._cohorts[group].names
            layers |= arrays or {name: values[key] for name, key in names.items()}
        return Message(content={**content, "update": "weights", "vectors": told}, layers=layers)

    def most_bytes(self, site: str) -> int:
        return sum(map(self._vectors.most_bytes, self._groups(site)))

    def begin(self, round_number: int) -> None:
        self._vectors.begin(round_number)

    def add(self, site: str, reply: Message) -> None:
        self._vectors.add(site, self._groups(site), reply.layers)

    def finish(self, values: Layers) -> tuple[Layers, int]:
        sums = self._vectors.finish(self._min_cohort)
        replaced = {key for group in sums for key in self._cohorts[group].names.values()}
        kept = {
            name: array for name, array in values.items() if name not in replaced and name.partition("/")[0] not in sums
        }
        unchanged = sum(len(cohort.names) for group, cohort in self._cohorts.items() if group not in sums)
        return {**kept, **{name: array for arrays in sums.values() for name, array in arrays.items()}}, unchanged
