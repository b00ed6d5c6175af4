"""Federated fingerprint extraction: one plan for all sites, as if their cases lay in one data set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nnunet_flare.fingerprint.summary import FingerprintSummary, merge_summaries
from nnunet_flare.flare import protocol
from nnunet_flare.flare.controller import FederatedTraining
from nnunet_flare.flare.replies import SitePlan, cast
from nnunet_flare.nnunet.network_plan import check_same_network_plans
from nnunet_flare.storage import read_json, write_json

__all__ = ["FFEController"]


class FFEController(FederatedTraining):
    """FFE, then federated averaging (Skorupko et al., Scientific Reports 15:38312, 2025).

    Args:
        run: Name of the run; a run of the same name that has not finished is continued.
        training: Settings of ``TrainingConfig`` that differ from its defaults.
        federation: Settings of ``FederationConfig`` that differ from its defaults.
    """

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
        write_json(self._folder / "plans.json", plans)
        configuration = plans["configurations"][self._config.configuration]
        stages = configuration["architecture"]["arch_kwargs"].get("n_stages")
        self._say(
            f"one plan for all: {self._config.configuration}, patch {configuration['patch_size']}, "
            f"batch {configuration['batch_size']}, {stages} stages"
        )
