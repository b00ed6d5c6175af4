"""One round of federated averaging, over whatever layers each site shares."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nnunet_flare.aggregation.layers import Layers, Signature, apply_update, check_layers
from nnunet_flare.aggregation.weighted_sum import WeightedSum
from nnunet_flare.errors import UpdateError
from nnunet_flare.flare import protocol
from nnunet_flare.flare.conductor import Conductor
from nnunet_flare.flare.history import RoundRecord, SiteRound
from nnunet_flare.flare.protocol import Message
from nnunet_flare.flare.replies import cast, site_round
from nnunet_flare.nnunet.config import TrainingConfig

__all__ = ["Aggregation", "AveragingRounds", "PlainAverage", "SiteShare"]


@dataclass(frozen=True, kw_only=True)
class SiteShare:
    """One site's part in the averaging.

    Args:
        role: ``train`` or ``evaluate``.
        names: Its layer -> the name of that layer's value at the server.
        shapes: Its layer -> shape.
        weight: Of its update in the mean.
        labels: That it may report scores of.
        model_bytes: Of all layers of its network, as float32; no reply of it brings more.
    """

    role: str
    names: Mapping[str, str]
    shapes: Signature
    weight: int
    labels: Collection[str]
    model_bytes: int

    def select(self, layers: Layers) -> Layers:
        """What the site gets of the server's values, by its own names."""
        return {name: layers[key] for name, key in self.names.items()}


class Aggregation(Protocol):
    """How the server makes its next values of what the sites send."""

    def on_the_wire(self, values: Layers) -> Layers:
        """The values as rounds send them; the final ones go as they are."""

    def request(self, site: str, content: Mapping[str, Any], values: Layers) -> Message:
        """What a site gets of the values, beside ``content``."""

    def most_bytes(self, site: str) -> int:
        """The most that the arrays of a site's reply can be."""

    def begin(self, round_number: int) -> None:
        """A new round, counted from 0."""

    def add(self, site: str, reply: Message) -> None:
        """Check a site's reply, then take it in; a reply that raises has changed nothing."""

    def finish(self, values: Layers) -> tuple[Layers, int]:
        """The next values, and how many layers of them keep theirs, for too few have answered."""


class PlainAverage:
    """Weighted mean of layers that the server reads.

    Args:
        config: How layers travel.
        shares: Site -> its part.
        min_cohort: Updates that a layer needs in a round; with fewer it keeps its value.
    """

    def __init__(self, config: TrainingConfig, shares: Mapping[str, SiteShare], min_cohort: int) -> None:
        self._wire_dtype, self._update = config.wire_dtype, config.update
        self._shares, self._min_cohort = shares, min_cohort

    def on_the_wire(self, values: Layers) -> Layers:
        return {name: array.astype(self._wire_dtype, copy=False) for name, array in values.items()}

    def request(self, site: str, content: Mapping[str, Any], values: Layers) -> Message:
        return Message(content={**content, "update": self._update}, layers=self._shares[site].select(values))

    def most_bytes(self, site: str) -> int:
        return self._shares[site].model_bytes

    def begin(self, round_number: int) -> None:
        self._total = WeightedSum(total_weight=sum(share.weight for share in self._shares.values()))

    def add(self, site: str, reply: Message) -> None:
        share = self._shares[site]
        check_layers(reply.layers, share.shapes, site=site)
        if reply.difference != (self._update == "difference"):
            raise UpdateError(
                field="update",
                expected=self._update,
                found="the other kind of layers",
                remedy="remove filters that change the kind of update",
                site=site,
            )
        self._total.add({share.names[name]: array for name, array in reply.layers.items()}, weight=share.weight)

    def finish(self, values: Layers) -> tuple[Layers, int]:
        mean = self._total.mean(min_sites=self._min_cohort)
        changed = apply_update(values, mean) if self._update == "difference" else {**values, **mean}
        return changed, len(values) - len(mean)


@dataclass(frozen=True, kw_only=True)
class AveragingRounds:
    """Layers down, local epochs, weighted mean (FedAvg: McMahan et al. 2017, Algorithm 1; asymmetric: Skorupko et al.
    2025, Algorithm 1).

    Args:
        conductor: Asks the sites.
        shares: Site -> its part.
        aggregation: Makes the mean.
    """

    conductor: Conductor
    shares: Mapping[str, SiteShare]
    aggregation: Aggregation

    def run(self, round_number: int, values: Layers, content: Mapping[str, Any]) -> tuple[Layers, RoundRecord]:
        """One round, counted from 0; a site that fails or is late is left out of it, and named.

        Args:
            round_number: Which round.
            values: The server's, by its own names.
            content: What every request says of the run.

        Raises:
            ParticipationError: fewer than ``min_sites`` sites have sent an update.
        """
        asked, wire = dict(content) | {"round": round_number}, self.aggregation.on_the_wire(values)
        requests = {site: self.aggregation.request(site, asked, wire) for site in self.shares}
        tasks = {"train": protocol.TRAIN, "evaluate": protocol.EVALUATE}
        results: dict[str, SiteRound] = {}
        started = time.monotonic()
        self.aggregation.begin(round_number)

        def accept(site: str, reply: Message) -> None:
            share, seconds = self.shares[site], time.monotonic() - started
            downloaded = protocol.layer_bytes(requests[site].layers)
            result = cast(
                site,
                reply,
                lambda content: site_round(share.role, share.labels, reply, download_bytes=downloaded, seconds=seconds),
            )
            if share.role == "train":
                self.aggregation.add(site, reply)
            results[site] = result

        outcome = self.conductor.ask(
            {site: (tasks[share.role], requests[site]) for site, share in self.shares.items()},
            accept,
            within_round=True,
            layer_bytes={site: self.aggregation.most_bytes(site) for site in self.shares},
        )
        trained = [site for site in results if self.shares[site].role == "train"]
        self.conductor.require(len(trained), f"updates in round {round_number + 1}", outcome.failures)
        changed, unchanged_layers = self.aggregation.finish(values)
        record = RoundRecord(
            round=round_number + 1,
            sites=results,
            unchanged_layers=unchanged_layers,
            missing={site: str(error) for site, error in outcome.failures.items()},
            seconds=time.monotonic() - started,
        )
        return changed, record
