"""What the final models are worth: every site's full validation, and models scored across sites."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_flare.aggregation.layers import Layers
from nnunet_flare.flare import protocol
from nnunet_flare.flare.conductor import Conductor
from nnunet_flare.flare.history import SiteFinal
from nnunet_flare.flare.protocol import Message
from nnunet_flare.flare.replies import cast, site_final
from nnunet_flare.flare.rounds import Aggregation
from nnunet_flare.nnunet.metrics import LabelMetrics
from nnunet_flare.nnunet.schema import DatasetSchema, dataset_json

__all__ = ["Scoring"]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Validation at the sites.

    Args:
        conductor: Asks the sites.
        schemas: Site -> its data set's schema.
        content: What every request says of the run.
        say: Writes a line to the server's log.
    """

    conductor: Conductor
    schemas: Mapping[str, DatasetSchema]
    content: Mapping[str, Any]
    say: Callable[[str], None]

    def validate(
        self, sites: Collection[str], values: Layers, aggregation: Aggregation
    ) -> tuple[dict[str, SiteFinal], dict[str, SiteFinal]]:
        """Final sync: every site keeps the final values and scores its model on its validation cases.

        Returns:
            Site -> scores of the model that it ends with, and of the one before fine-tuning where it does that.

        Raises:
            ParticipationError: fewer than ``min_sites`` sites have answered.
        """
        final: dict[str, SiteFinal] = {}
        before: dict[str, SiteFinal] = {}

        def accept(site: str, reply: Message) -> None:
            if "cases_before" in reply.content:
                before[site] = self._scores(site, reply, "cases_before")
            final[site] = self._scores(site, reply, "cases")

        outcome = self.conductor.ask(
            {site: (protocol.VALIDATE, aggregation.request(site, self.content, values)) for site in sites},
            accept,
        )
        for error in outcome.failures.values():
            self.say(f"no validation: {error}")
        self.conductor.require(len(final), "validations of the final model", outcome.failures)
        return dict(sorted(final.items())), dict(sorted(before.items()))

    def across_sites(self, owner: str, model_bytes: int) -> dict[str, LabelMetrics]:
        """Mean scores of one site's final model at every other site, if its settings let the model travel."""
        described = dataset_json(self.schemas[owner], self.schemas[owner].num_training)
        models: list[Message] = []
        scores: dict[str, LabelMetrics] = {}

        def accept_model(site: str, reply: Message) -> None:
            plans = cast(site, reply, lambda content: dict(content["plans"]))
            content = {**self.content, "plans": plans, "dataset_json": described}
            models.append(Message(content=content, layers=reply.layers))

        def accept_scores(site: str, reply: Message) -> None:
            scores[site] = self._scores(site, reply, "cases").foreground

        asked = {owner: (protocol.FINAL_MODEL, Message(content=self.content))}
        outcome = self.conductor.ask(asked, accept_model, layer_bytes={owner: model_bytes})
        for model in models:
            others = dict.fromkeys(self.schemas.keys() - {owner}, (protocol.SCORE_MODEL, model))
            outcome = self.conductor.ask(others, accept_scores)
        for error in outcome.failures.values():
            self.say(f"no cross-site scores of {owner}'s model: {error}")
        return scores

    def _scores(self, site: str, reply: Message, key: str) -> SiteFinal:
        return cast(site, reply, lambda content: site_final(content[key], self.schemas[site].labels))
