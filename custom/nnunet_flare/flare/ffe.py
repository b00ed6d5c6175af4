"""Federated fingerprint extraction: one plan for all sites, as if their cases lay in one data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nnunet_flare.aggregation.layers import Layers
from nnunet_flare.aggregation.network import Network, check_same_network
from nnunet_flare.aggregation.sharing import SharingConfig
from nnunet_flare.fingerprint.summary import FingerprintSummary, merge_summaries
from nnunet_flare.flare import protocol
from nnunet_flare.flare.controller import FederatedTraining
from nnunet_flare.flare.replies import SitePlan, cast
from nnunet_flare.nnunet.network_plan import check_same_network_plans
from nnunet_flare.nnunet.schema import check_schemas_match, dataset_json
from nnunet_flare.storage import read_json, write_json

__all__ = ["FFEController"]


class FFEController(FederatedTraining):
    """FFE, then federated averaging (Skorupko et al., Scientific Reports 15:38312, 2025).

    Args:
        run: Name of the run; a run of the same name that has not finished is continued.
        training: Settings of ``TrainingConfig`` that differ from its defaults.
        federation: Settings of ``FederationConfig`` that differ from its defaults.
        keep_local: Layers that stay at their site, as in ``SharingConfig``; the server then has no whole model.
    """

    def __init__(
        self,
        run: str,
        training: dict[str, Any] | None = None,
        federation: dict[str, Any] | None = None,
        keep_local: list[str] | None = None,
    ) -> None:
        self.keep_local = keep_local
        one_network = SharingConfig(alignment="name", keep_local=keep_local or (), min_cohort=1, min_overlap=0)
        super().__init__(run, training, federation, one_network)

    def _check_schemas(self) -> None:
        check_schemas_match(self._schemas)

    def _planning_phases(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        return ("fingerprint", self._merge_fingerprints), ("plan", self._plan)

    def _merge_fingerprints(self) -> None:
        """The fingerprint of all cases, as if they lay in one data set (recorded; not repeated on resume)."""
        record = self._folder / "fingerprint_summary.json"
        if record.exists():
            self._summary = FingerprintSummary.from_json(read_json(record))
            return
        question = {
            "num_foreground_voxels": self._config.num_foreground_voxels,
            "num_cases_total": sum(self._num_cases.values()),
        }
        replies = self._ask_every_site(protocol.EXTRACT_FINGERPRINT, question)
        summaries = [
            cast(site, replies[site], lambda content: FingerprintSummary.from_json(content["summary"]))
            for site in self._training_sites
        ]
        self._summary = merged = merge_summaries(summaries)
        write_json(self._folder / "dataset_fingerprint.json", merged.to_nnunet())
        write_json(record, merged.to_json())
        self._say(f"fingerprint of {merged.num_training} cases merged from {len(summaries)} sites")

    def _plan(self) -> None:
        """Every site plans from the merged fingerprint; the network plans must be the same."""
        replies = self._ask_every_site(protocol.PLAN, {"summary": self._summary.to_json()})
        parse = partial(SitePlan.parse, self._config.configuration)
        planned = {site: cast(site, reply, parse) for site, reply in replies.items()}
        check_same_network_plans({site: plan.network_plan for site, plan in planned.items()})
        plans = dict(planned[self._training_sites[0]].plans)
        plans["dataset_name"] = f"Dataset000_{self.run}"
        self._plans = plans
        first = self._schemas[self._training_sites[0]]
        self._dataset_json = dataset_json(first, sum(self._num_cases.values()))
        write_json(self._folder / "plans.json", plans)
        configuration = plans["configurations"][self._config.configuration]
        stages = configuration["architecture"]["arch_kwargs"].get("n_stages")
        self._say(
            f"one plan for all: {self._config.configuration}, patch {configuration['patch_size']}, "
            f"batch {configuration['batch_size']}, {stages} stages"
        )

    def _architecture(self, site: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return self._plans, self._dataset_json

    def _check_networks(self, networks: Mapping[str, Network]) -> None:
        first = self._training_sites[0]
        for site, network in networks.items():
            remedy = "use the same trainer and plans at every site"
            check_same_network(site, network, networks[first], origin=f"at {first}", remedy=remedy)

    def _export(self, layers: Layers) -> None:
        """The global model, predict-ready, where all of it is shared."""
        if self._sharing.is_complete(self._training_sites[0]):
            self._call(
                "export_model",
                {
                    "job": self._config.to_json(),
                    "plans": self._plans,
                    "dataset_json": self._dataset_json,
                    "fingerprint": read_json(self._folder / "dataset_fingerprint.json"),
                    "folder": str(self._folder / "model"),
                },
                layers,
            )
        super()._export(layers)
