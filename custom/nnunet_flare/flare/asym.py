"""Asymmetric federated averaging: each site keeps the network that fits its own data, and shares what is common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nnunet_flare.aggregation.sharing import SharingConfig
from nnunet_flare.flare import protocol
from nnunet_flare.flare.controller import FederatedTraining
from nnunet_flare.flare.replies import cast, site_architecture
from nnunet_flare.nnunet.schema import check_labels_agree, dataset_json

__all__ = ["AsymFedAvgController"]


class AsymFedAvgController(FederatedTraining):
    """AsymFedAvg (Skorupko et al., Scientific Reports 15:38312, 2025, Algorithm 1), and sharing by cohorts.

    Every site plans from its own fingerprint, which it keeps. In the rounds only layers that are shared travel, in both
    directions; the server has no whole model, but for cross-site scores those that their sites let travel.

    Args:
        run: Name of the run; a run of the same name that has not finished is continued.
        training: Settings of ``TrainingConfig`` that differ from its defaults.
        federation: Settings of ``FederationConfig`` that differ from its defaults.
        sharing: Settings of ``SharingConfig`` that differ from its defaults.
        encryption: Settings of ``EncryptionConfig``; None adds in clear text.
    """

    def __init__(
        self,
        run: str,
        training: dict[str, Any] | None = None,
        federation: dict[str, Any] | None = None,
        sharing: dict[str, Any] | None = None,
        encryption: dict[str, Any] | None = None,
    ) -> None:
        self.sharing = sharing
        super().__init__(run, training, federation, SharingConfig.from_json(sharing or {}), encryption)

    def _check_schemas(self) -> None:
        check_labels_agree(self._schemas)

    def _planning_phases(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        return (("plan", self._plan),)

    def _plan(self) -> None:
        """Every site plans for itself, and tells its network's architecture."""
        replies = self._ask_every_site(protocol.PLAN_LOCALLY)
        parse = partial(site_architecture, self._config.configuration)
        self._plans = {site: cast(site, reply, parse) for site, reply in replies.items()}
        for site, plans in self._plans.items():
            architecture = plans["configurations"][self._config.configuration]["architecture"]["arch_kwargs"]
            stages, kernels = architecture.get("n_stages"), architecture.get("kernel_sizes")
            self._say(f"{site} plans {stages!r} stages, kernels {kernels!r}"[:200])

    def _architecture(self, site: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return self._plans[site], dataset_json(self._schemas[site], self._num_cases[site])
