"""Federated fingerprint extraction: one plan for all sites, as if their cases lay in one data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nnunet_flare.aggregation.layers import Layers
from nnunet_flare.aggregation.network import Network, check_same_network
from nnunet_flare.aggregation.sharing import SharingConfig
from nnunet_flare.encryption.vector import VectorLayout
from nnunet_flare.fingerprint.histogram import num_counts
from nnunet_flare.fingerprint.summary import FingerprintSummary, merge_summaries
from nnunet_flare.flare import protocol
from nnunet_flare.flare.controller import FederatedTraining
from nnunet_flare.flare.encrypted import EncryptedVectors
from nnunet_flare.flare.protocol import Message
from nnunet_flare.flare.replies import SitePlan, cast
from nnunet_flare.flare.run import read_arrays, write_arrays
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
        encryption: Settings of ``EncryptionConfig``; None adds in clear text. Fingerprints are encrypted too.
    """

    def __init__(
        self,
        run: str,
        training: dict[str, Any] | None = None,
        federation: dict[str, Any] | None = None,
        keep_local: list[str] | None = None,
        encryption: dict[str, Any] | None = None,
    ) -> None:
        self.keep_local = keep_local
        one_network = SharingConfig(alignment="name", keep_local=keep_local or (), min_cohort=1, min_overlap=0)
        super().__init__(run, training, federation, one_network, encryption)

    def _check_schemas(self) -> None:
        check_schemas_match(self._schemas)

    def _planning_phases(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        return ("fingerprint", self._merge_fingerprints), ("plan", self._plan)

    def _merge_fingerprints(self) -> None:
        """The fingerprint of all cases, as if they lay in one data set (recorded; not repeated on resume)."""
        if self._encryption:
            self._add_fingerprints()
            return
        record = self._folder / "fingerprint_summary.json"
        if record.exists():
            self._summary = FingerprintSummary.from_json(read_json(record))
            return
        replies = self._ask_every_site(protocol.EXTRACT_FINGERPRINT, self._draws())
        summaries = [
            cast(site, replies[site], lambda content: FingerprintSummary.from_json(content["summary"]))
            for site in self._training_sites
        ]
        self._summary = merged = merge_summaries(summaries)
        write_json(self._folder / "dataset_fingerprint.json", merged.to_nnunet())
        write_json(record, merged.to_json())
        self._say(f"fingerprint of {merged.num_training} cases merged from {len(summaries)} sites")

    def _draws(self) -> dict[str, int]:
        total = sum(self._num_cases.values())
        return {"num_foreground_voxels": self._config.num_foreground_voxels, "num_cases_total": total}

    def _add_fingerprints(self) -> None:
        """The encrypted counts of all cases (recorded; not repeated on resume)."""
        channels = len(self._schemas[self._training_sites[0]].channel_names)
        layout = VectorLayout(
            scope=f"{self._run_id}/{protocol.FINGERPRINT}",
            shapes={protocol.COUNTS: (num_counts(channels),)},
            weights=dict.fromkeys(self._training_sites, 1),
            max_abs=None,
        )
        vectors = EncryptedVectors({protocol.FINGERPRINT: layout}, self._key)
        record = self._folder / "fingerprint_sum.npz"
        if not record.exists():
            vectors.begin(0)
            told, _ = vectors.request(protocol.FINGERPRINT, {})
            content = self._request_content() | self._draws() | {"vectors": {protocol.FINGERPRINT: told}}

            def accept(site: str, reply: Message) -> None:
                if site in self._training_sites:
                    vectors.add(site, (protocol.FINGERPRINT,), reply.layers)

            self._conductor.ask_every(
                dict.fromkeys(self._sites, (protocol.EXTRACT_FINGERPRINT, Message(content=content))),
                accept,
                layer_bytes=dict.fromkeys(self._sites, vectors.most_bytes(protocol.FINGERPRINT)),
            )
            sums = vectors.finish(len(self._training_sites))[protocol.FINGERPRINT]
            write_arrays(record, sums)
        told, arrays = vectors.request(protocol.FINGERPRINT, read_arrays(record))
        self._fingerprint = Message(
            content={"vectors": {protocol.FINGERPRINT: told}, "num_channels": channels}, layers=arrays
        )
        self._say(f"fingerprints of {len(self._training_sites)} sites added, encrypted")

    def _plan(self) -> None:
        """Every site plans from the merged fingerprint; the network plans must be the same."""
        question = self._fingerprint if self._encryption else Message(content={"summary": self._summary.to_json()})
        replies = self._ask_every_site(protocol.PLAN, question.content, question.layers)
        parse = partial(SitePlan.parse, self._config.configuration)
        planned = {site: cast(site, reply, parse) for site, reply in replies.items()}
        check_same_network_plans({site: plan.network_plan for site, plan in planned.items()})
        self._plans = plans = dict(planned[self._training_sites[0]].plans)
        first = self._schemas[self._training_sites[0]]
        self._dataset_json = dataset_json(first, sum(self._num_cases.values()))
        configuration = plans["configurations"][self._config.configuration]
        told = f"{configuration['architecture']['arch_kwargs'].get('n_stages')} stages"
        if not self._encryption:
            plans["dataset_name"] = f"Dataset000_{self.run}"
            write_json(self._folder / "plans.json", plans)
            told += f", patch {configuration['patch_size']}, batch {configuration['batch_size']}"
        self._say(f"one plan for all: {self._config.configuration}, {told}")

    def _architecture(self, site: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return self._plans, self._dataset_json

    def _check_networks(self, networks: Mapping[str, Network]) -> None:
        first = self._training_sites[0]
        for site, network in networks.items():
            remedy = "use the same trainer and plans at every site"
            check_same_network(site, network, networks[first], origin=f"at {first}", remedy=remedy)

    def _export(self, layers: Layers) -> None:
        """The global model, predict-ready, where all of it is shared and the server can read it."""
        if not self._encryption and self._sharing.is_complete(self._training_sites[0]):
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
