"""One round of federated averaging, over whatever layers each site shares."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_flare.aggregation.layers import Layers, Signature, apply_update, check_layers
from nnunet_flare.aggregation.weighted_sum import WeightedSum
from nnunet_flare.errors import UpdateError
from nnunet_flare.flare import protocol
from nnunet_flare.flare.conductor import Conductor
from nnunet_flare.flare.history import RoundRecord, SiteRound
from nnunet_flare.flare.protocol import Message
from nnunet_flare.flare.replies import cast, site_round
from nnunet_flare.nnunet.config import TrainingConfig

__all__ = ["AveragingRounds", "SiteShare"]


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


@dataclass(frozen=True, kw_only=True)
class AveragingRounds:
    """Layers down, local epochs, weighted mean (FedAvg: McMahan et al. 2017, Algorithm 1; asymmetric: Skorupko et al.
    2025, Algorithm 1).

    Args:
        conductor: Asks the sites.
        config: How layers travel.
        shares: Site -> its part.
        min_cohort: Updates that a layer needs in a round; with fewer it keeps its value.
    """

    conductor: Conductor
    config: TrainingConfig
    shares: Mapping[str, SiteShare]
    min_cohort: int

    def run(self, round_number: int, layers: Layers, content: Mapping[str, Any]) -> tuple[Layers, RoundRecord]:
        """One round, counted from 0; a site that fails or is late is left out of it, and named.

        Args:
            round_number: Which round.
            layers: The server's values.
            content: What every request says of the run.

        Raises:
            ParticipationError: fewer than ``min_sites`` sites have sent an update.
        """
        difference = self.config.update == "difference"
        wire = {name: array.astype(self.config.wire_dtype, copy=False) for name, array in layers.items()}
        asked = dict(content) | {"round": round_number, "update": self.config.update}
        requests = {site: Message(content=asked, layers=share.select(wire)) for site, share in self.shares.items()}
        tasks = {"train": protocol.TRAIN, "evaluate": protocol.EVALUATE}
        total = WeightedSum(total_weight=sum(share.weight for share in self.shares.values()))
        results: dict[str, SiteRound] = {}
        started = time.monotonic()

        def accept(site: str, reply: Message) -> None:
            share, seconds = self.shares[site], time.monotonic() - started
            downloaded = protocol.layer_bytes(requests[site].layers)
            result = cast(
                site,
                reply,
                lambda content: site_round(share.role, share.labels, reply, download_bytes=downloaded, seconds=seconds),
            )
            if share.role == "train":
                check_layers(reply.layers, share.shapes, site=site)
                if reply.difference != difference:
                    raise UpdateError(
                        field="update",
                        expected=self.config.update,
                        found="the other kind of layers",
                        remedy="remove filters that change the kind of update",
                        site=site,
                    )
                total.add({share.names[name]: array for name, array in reply.layers.items()}, weight=share.weight)
            results[site] = result

        outcome = self.conductor.ask(
            {site: (tasks[share.role], requests[site]) for site, share in self.shares.items()},
            accept,
            within_round=True,
            layer_bytes={site: share.model_bytes for site, share in self.shares.items()},
        )
        trained = [site for site in results if self.shares[site].role == "train"]
        self.conductor.require(len(trained), f"updates in round {round_number + 1}", outcome.failures)
        mean = total.mean(min_sites=self.min_cohort)
        record = RoundRecord(
            round=round_number + 1,
            sites=results,
            unchanged_layers=len(layers) - len(mean),
            missing={site: str(error) for site, error in outcome.failures.items()},
            seconds=time.monotonic() - started,
        )
        return (apply_update(layers, mean) if difference else {**layers, **mean}), record
