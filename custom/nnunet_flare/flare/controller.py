"""The server's side: the phases of a federated nnU-Net training, each ending with a record on disk."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.widgets.info_collector import InfoCollector

from nnunet_flare.aggregation.layers import Layers
from nnunet_flare.aggregation.network import Network
from nnunet_flare.aggregation.sharing import Sharing, SharingConfig
from nnunet_flare.errors import (
    ConfigError,
    DecryptionError,
    LayerMismatchError,
    NNUNetFlareError,
    ParticipationError,
)
from nnunet_flare.flare import protocol
from nnunet_flare.flare.conductor import Conductor, RunStoppedError
from nnunet_flare.flare.config import EncryptionConfig, FederationConfig
from nnunet_flare.flare.coverage import COVERAGE_FILE, COVERAGE_PICTURE, report_coverage
from nnunet_flare.flare.curves import CURVES_FILE, draw_learning_curves
from nnunet_flare.flare.encrypted import EncryptedAverage, cohorts_of
from nnunet_flare.flare.history import CSV_FILE, JSON_FILE, RoundRecord, RunHistory
from nnunet_flare.flare.protocol import Message
from nnunet_flare.flare.replies import SiteDescription, SiteLayers, cast, check_versions
from nnunet_flare.flare.results import PROGRESS, leave_results, reason_of
from nnunet_flare.flare.rounds import Aggregation, AveragingRounds, PlainAverage, SiteShare
from nnunet_flare.flare.run import RunFolder
from nnunet_flare.flare.run_key import agree_on_key, forget_key
from nnunet_flare.flare.scoring import Scoring
from nnunet_flare.flare.series import series_of
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.process import NNUNetProcess
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.storage import read_json, write_json

__all__ = ["FederatedTraining"]

SERVER = "server"
TENSORBOARD_FOLDER = "tb_events"
SHARING_FILE, KEY_FILE = "sharing.json", "encryption.json"
_STOPPED = "the job was stopped; submit it again to continue the run"
ARTIFACTS = {
    "model": "model",
    "plans": "plans.json",
    "fingerprint": "dataset_fingerprint.json",
    "coverage": COVERAGE_FILE,
    "coverage picture": COVERAGE_PICTURE,
    "curves": CURVES_FILE,
    "metrics": JSON_FILE,
    "table": CSV_FILE,
}
"""Name -> path of what may be there when a run ends: in the folder of the fold, or else of the run."""


class FederatedTraining(Controller, ABC):
    """Describe, plan, agree on layers, average over rounds, validate: what every federated nnU-Net training does.

    How the sites come to their plans is the subclass's matter. The job ends as failed, with the reason, on everything
    that the remaining sites cannot mend.

    Args:
        run: Name of the run; a run of the same name that has not finished is continued.
        training: Settings of ``TrainingConfig`` that differ from its defaults.
        federation: Settings of ``FederationConfig`` that differ from its defaults.
        sharing: Which layers the sites share.
        encryption: Settings of ``EncryptionConfig``; None adds in clear text.

    Raises:
        ConfigError: a setting is unknown or wrong, or does not go with encryption.
    """

    def __init__(
        self,
        run: str,
        training: dict[str, Any] | None,
        federation: dict[str, Any] | None,
        sharing: SharingConfig,
        encryption: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        self.run, self.training, self.federation, self.encryption = run, training, federation, encryption
        self._config = TrainingConfig.from_json(training or {})
        self._federation = FederationConfig.from_json(federation or {})
        self._sharing_config = sharing
        self._encryption = None if encryption is None else EncryptionConfig.from_json(encryption)
        if self._encryption:
            _check_goes_with_encryption(self._config, self._federation)
            self._config = replace(self._config, update="weights")
        self._sites: dict[str, str] = {}

    def start_controller(self, fl_ctx: FLContext) -> None:
        """FLARE's hook; the run's folder is opened in ``control_flow``, where a failure can end the job."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """FLARE's hook; ``control_flow`` cleans up behind itself."""

    def process_result_of_unknown_task(self, client, task_name, client_task_id, result, fl_ctx) -> None:
        """A reply after its deadline: the site was left out of that round."""
        self.log_info(fl_ctx, f"{client.name} answered {task_name} too late", fire_event=False)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == InfoCollector.EVENT_TYPE_GET_STATS and hasattr(self, "_history"):
            answer = {"sites": sorted(self._sites), "history": self._history.recent().to_json()}
            fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR).set_info(PROGRESS, answer)
        elif event_type == EventType.END_RUN:
            run_folder = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
            if (run_folder / TENSORBOARD_FOLDER).is_dir() and hasattr(self, "_folder"):
                shutil.copytree(run_folder / TENSORBOARD_FOLDER, self._folder / "tensorboard", dirs_exist_ok=True)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        self._fl_ctx = fl_ctx
        self._conductor = Conductor(self, self._federation, fl_ctx, abort_signal, self._say)
        run = process = None
        try:
            local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
            settings = SiteSettings.load(SERVER, local)
            run = RunFolder(settings.folder, self.run)
            self._open(run, settings)
            process = self._process = NNUNetProcess(log_file=run.path / "nnunet.log", num_threads=1)
            is_whole = self._is_done() or self._conduct()
            self._leave_results(run, with_weights=is_whole)
            if is_whole:
                if self._encryption:  # also of a run whose last job was lost just before
                    self._forget_keys()
                run.finish()
        except Exception as error:
            reason = None
            if isinstance(error, RunStoppedError) or (abort_signal.triggered and isinstance(error, NNUNetFlareError)):
                self._say(_STOPPED)
            else:
                reason = reason_of(error)
                if isinstance(reason, DecryptionError):
                    self._forget_keys()  # first, for a failed job asks nobody anything
                self._fail(reason)
            try:
                self._leave_results(run, reason)
            except OSError as unwritten:
                self.log_error(fl_ctx, f"the job's end cannot be downloaded: {unwritten.strerror}", fire_event=False)
        finally:
            if process is not None:
                process.close()
            if run is not None:
                run.close()

    def _leave_results(
        self, run: RunFolder | None, error: NNUNetFlareError | None = None, *, with_weights: bool = False
    ) -> None:
        """Put into the job's own folder what FLARE lets its submitter download; the simulator has no submitter."""
        if not self._fl_ctx.get_prop(FLContextKey.SIMULATE_MODE):
            workspace = self._fl_ctx.get_engine().get_workspace()
            job_folder = Path(workspace.get_run_dir(self._fl_ctx.get_job_id()))
            leave_results(run, job_folder, error, with_weights=with_weights and not self._encryption)

    def _open(self, run: RunFolder, settings: SiteSettings) -> None:
        identity = {name: value for name, value in self._config.to_json().items() if name != "stop_after"}
        identity |= self._sharing_config.to_json()
        if self._encryption:
            identity |= {"encryption": self._encryption.to_json()}
        self._run, self._settings = run, settings
        if not run.path.exists():
            self._pretrained()  # a new run with a misspelt checkpoint ends before it is one
        self._run_id = run.begin(identity, series_of(self._fl_ctx.get_prop(FLContextKey.JOB_META) or {}))
        self._folder, self._all_folds = run.path, self._config
        for fold in self._config.folds:
            self._enter(fold)
            if not self._is_done():
                return

    def _enter(self, fold: int | str) -> None:
        """Go to a fold: its place in the run's folder, and how far it is."""
        name = self.run
        if len(self._all_folds.folds) > 1:
            name = f"{self.run}, fold {fold}"
            self._run.enter_fold(fold)
        self._config, self._record = self._all_folds.of_fold(fold), self._run.fold_path
        if (self._record / JSON_FILE).exists():
            self._history = RunHistory.load(self._record)
        else:
            started, num_rounds = time.time(), self._config.num_rounds
            self._history = RunHistory(run_name=name, run_id=self._run_id, num_rounds=num_rounds, started=started)

    def _is_done(self) -> bool:
        """True if the fold is; after ``_open``, if all of them are."""
        return self._history.phase == "done" and bool(self._history.final)

    def _fail(self, error: NNUNetFlareError) -> None:
        self.log_error(self._fl_ctx, f"{error} {error.local_detail}".strip(), fire_event=False)
        if hasattr(self, "_history") and not self._is_done():
            with contextlib.suppress(OSError):  # a full disk may be the error
                self._note(phase="failed", error=str(error))
        self.system_panic(str(error), self._fl_ctx)

    def _note(self, **changes: Any) -> None:
        self._history = self._history.changed(**changes)
        self._history.save(self._record)

    def _say(self, text: str) -> None:
        self.log_info(self._fl_ctx, text, fire_event=False)

    # --- the phases -----------------------------------------------------------------------------------------------

    @abstractmethod
    def _check_schemas(self) -> None:
        """Refuse data sets (``self._schemas``) that do not fit each other."""

    def _check_networks(self, networks: Mapping[str, Network]) -> None:
        """Refuse networks that do not fit each other, where sharing some layers is not enough."""

    @abstractmethod
    def _planning_phases(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        """Name and method of each phase that leads to every site's plans, in order; a job may stop after any."""

    @abstractmethod
    def _architecture(self, site: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Plans (or only their architecture) and ``dataset.json`` that a site's network is built from."""

    def _conduct(self) -> bool:
        """True if the run is at its end, False if the job was to stop before."""
        planning = self._planning_phases()
        stages = [*dict(planning), "preprocess"]
        if self._config.stop_after not in (None, *stages):
            raise ConfigError(
                field="stop_after",
                expected=f"one of {', '.join(stages)}",
                found=self._config.stop_after,
                remedy="correct the job's settings: this job has no such phase",
            )
        self._describe()
        if self._encryption:
            self._agree_on_key()
        for stage, phase in planning:
            self._note(phase=stage)
            phase()
            if self._stops_after(stage):
                return False
        for fold in self._all_folds.folds:
            self._enter(fold)
            if self._is_done():
                continue
            self._note(phase="preprocess", error="")
            self._agree_on_layers()
            if self._stops_after("preprocess"):
                return False
            layers = self._train()
            self._note(phase="validate")
            self._export(layers)
            self._score(layers)
            self._note(phase="done")
            self._say(f"done: {self._record}")
        return True

    def _stops_after(self, stage: str) -> bool:
        if stage == self._config.stop_after:
            self._note(phase="done")
            self._say(f"stopped after {stage}, as the job says; without stop_after the run continues from here")
        return stage == self._config.stop_after

    def _connected(self) -> list[str]:
        return sorted(client.name for client in self._fl_ctx.get_engine().get_clients())

    def _describe(self) -> None:
        """Who takes part, and whether their data and versions fit, before anything is computed."""
        self._note(phase="describe", error="")
        self._sites = dict.fromkeys(self._connected(), "")
        replies = self._ask_every_site(protocol.DESCRIBE)
        described = {site: cast(site, reply, SiteDescription.parse) for site, reply in replies.items()}
        self._sites = {site: description.role for site, description in described.items()}
        check_versions({site: description.versions for site, description in described.items()})
        self._schemas = {site: description.schema for site, description in described.items()}
        self._check_schemas()
        self._training_sites = [site for site, role in self._sites.items() if role == "train"]
        self._sharing = None
        if self._run.has_weights():
            self._sharing = Sharing.from_json(read_json(self._folder / SHARING_FILE))
        members = {*self._training_sites, *(self._sharing.networks if self._sharing else ())}
        if self._encryption:
            self._check_sums_are_large_enough(members, described)
        self._conductor.min_sites = max(self._federation.min_sites or len(members), self._sharing_config.min_cohort)
        absent = {site: _absent(site) for site in sorted(members - set(self._training_sites))}
        self._conductor.require(len(self._training_sites), "sites that train", absent)
        self._num_cases = {site: self._schemas[site].num_training for site in self._training_sites}
        cases = ", ".join(f"{site} {number} cases" for site, number in self._num_cases.items())
        self._say(f"run {self.run}: {len(self._sites)} sites ({cases})")
        if len(self._training_sites) == 1:
            self._say("only one site trains: this is no federation; set min_sites to wait for the others")

    def _check_sums_are_large_enough(self, members: Collection[str], described: Mapping[str, SiteDescription]) -> None:
        """No group has fewer sites than each of them demands."""
        least = max(description.min_sites_in_sum for description in described.values())
        if len(members) < least:
            raise ConfigError(
                field="sites that train",
                expected=f"at least {least}, for each site of a smaller sum learns much of the others'",
                found=str(len(members)),
                remedy="bring more sites; or every site sets min_sites_in_sum to 2 in its own settings",
                site=max(described, key=lambda site: described[site].min_sites_in_sum),
            )
        self._sharing_config = replace(self._sharing_config, min_cohort=max(least, self._sharing_config.min_cohort))

    def _agree_on_key(self) -> None:
        """Every site holds the run's key; the server knows its name."""
        self._key = agree_on_key(
            self._conductor,
            self._request_content(),
            sites=self._sites,
            holder=self._encryption.key_holder or self._training_sites[0],
            num_sites=len({*self._training_sites, *(self._sharing.networks if self._sharing else ())}),
            record=self._folder / KEY_FILE,
        )
        if self._fl_ctx.get_prop(FLContextKey.SIMULATE_MODE):
            self._say("encrypted with throw-away certificates, for the simulator has no others: they protect nothing")

    def _forget_keys(self) -> None:
        forget_key(self._conductor, self._request_content(), self._sites or self._connected(), self._say)

    def _agree_on_layers(self) -> None:
        """Every site preprocesses and opens its training; what they share is settled once for the run."""
        self._start = self._run.load_global()
        if self._start is None:
            self._process.start()  # imports torch while the sites preprocess
        replies = self._ask_every_site(protocol.LAYER_SIGNATURE)
        opened = {
            site: cast(site, reply, partial(SiteLayers.parse, self._schemas[site].num_training))
            for site, reply in replies.items()
        }
        networks = {site: opened[site].network for site in self._training_sites}
        self._check_networks(networks)
        if self._sharing is None:
            self._sharing = Sharing.among(networks, self._sharing_config)
        else:
            self._sharing = self._sharing.joined_by(networks, self._sharing_config)
        write_json(self._folder / SHARING_FILE, self._sharing.to_json())
        if self._start is None:
            self._start = 0, self._initial_layers()
            self._run.save_global(*self._start)
        shares = {site: self._share(site, layers) for site, layers in opened.items()}
        self._rounds = AveragingRounds(conductor=self._conductor, shares=shares, aggregation=self._aggregation(shares))
        sizes = self._sharing.sizes()
        self._say(f"{len(sizes)} layers shared, {sum(sizes.values()) / 1e6:.1f} million parameters")
        if not all(map(self._sharing.is_complete, self._sharing.networks)):
            report_coverage(self._sharing, self._folder, self._say)

    def _aggregation(self, shares: Mapping[str, SiteShare]) -> Aggregation:
        if not self._encryption:
            return PlainAverage(self._config, shares, self._sharing_config.min_cohort)
        return EncryptedAverage(
            cohorts_of(self._sharing),
            shares,
            scope=f"{self._run_id}/{self._config.fold}",
            max_abs=self._encryption.max_abs_weight,
            min_cohort=self._sharing_config.min_cohort,
            key=self._key,
        )

    def _share(self, site: str, opened: SiteLayers) -> SiteShare:
        role, weight = self._sites[site], 0
        if role == "train":
            names = self._sharing.names_of(site)
            weight = opened.num_training_cases if self._config.weighting == "cases" else 1
        else:
            names = self._whole_network(site, opened.network)
        shapes = {name: opened.network[name].shape for name in names}
        labels = self._schemas[site].labels.keys()
        model_bytes = 4 * sum(math.prod(layer.shape) for layer in opened.network.values())
        return SiteShare(role=role, names=names, shapes=shapes, weight=weight, labels=labels, model_bytes=model_bytes)

    def _whole_network(self, site: str, network: Network) -> dict[str, str]:
        """Layers of a site that only evaluates: it has none of its own, so all must be shared by those that train."""
        for other, known in self._sharing.networks.items():
            if known == network and self._sharing.is_complete(other):
                return self._sharing.names_of(other)
        raise ConfigError(
            field="role",
            expected="train, where layers stay at their sites",
            found="evaluate",
            remedy="let the site train, or use jobs/ffe without keep_local",
            site=site,
        )

    def _initial_layers(self) -> dict[str, np.ndarray]:
        """Every shared layer as it is in a fresh network of its first site: all sites start from the same values."""
        initial = {}
        for site, names in self._sharing.donors(self._training_sites).items():
            plans, described = self._architecture(site)
            layers = self._call(
                "initial_layers",
                {
                    "job": self._config.to_json(),
                    "alignment": self._sharing_config.alignment,
                    "plans": plans,
                    "dataset_json": described,
                    "pretrained": self._pretrained(),
                },
            )
            expected = {name: self._sharing.networks[site][name].shape for name in names}
            if any(name not in layers or layers[name].shape != shape for name, shape in expected.items()):
                raise LayerMismatchError(
                    field="layers",
                    expected="those of the architecture that the site told",
                    found="layers of other names or shapes",
                    remedy="use the same trainer and versions at every site and at the server",
                    site=site,
                )
            initial |= {key: layers[name] for name, key in names.items()}
        self._process.close()
        return initial

    def _call(self, command: str, arguments: Mapping[str, Any], layers: Layers | None = None) -> Layers:
        """Have the server's own nnU-Net process do something."""
        cancelled = self._conductor.abort_signal
        return self._process.call(command, arguments, layers, cancelled=lambda: cancelled.triggered)[1]

    def _pretrained(self) -> str | None:
        if not self._config.pretrained:
            return None
        file = self._settings.home / "pretrained" / self._config.pretrained
        if not file.is_file():
            raise ConfigError(
                field="pretrained",
                expected="a checkpoint in the server's pretrained folder",
                found=self._config.pretrained,
                remedy="copy the checkpoint there, or leave the setting out",
                site=SERVER,
                local_detail=str(file),
            )
        return str(file)

    def _train(self) -> Layers:
        """The rounds that are still to do; returns the final global layers."""
        first, layers = self._start
        self._note(phase="train", rounds=tuple(item for item in self._history.rounds if item.round <= first))
        if first:
            self._say(f"continuing with round {first + 1} of {self._config.num_rounds}")
        for round_number in range(first, self._config.num_rounds):
            layers, record = self._rounds.run(round_number, layers, self._request_content())
            for reason in record.missing.values():
                self._say(f"left out of round {record.round}: {reason}")
            if clipped := sum(result.num_clipped for result in record.sites.values()):
                self._say(f"{clipped} weights lie beyond {self._encryption.max_abs_weight} and were clipped")
            if record.unchanged_layers:
                self._say(f"{record.unchanged_layers} layers keep their values: too few of their sites have answered")
            self._history = self._history.with_round(record)
            self._history.save(self._record)
            self._run.save_global(round_number + 1, layers)
            self._publish(record)
            self._say(self._history.progress_line(record))
        return layers

    def _export(self, layers: Layers) -> None:
        """What the run leaves at the server; before any site's validation can fail."""
        draw_learning_curves(self._history, self._record / CURVES_FILE)
        places = {name: (self._record / path, self._folder / path) for name, path in ARTIFACTS.items()}
        files = {name: file for name, files in places.items() for file in files if file.exists()}
        files |= {"tensorboard": self._folder / "tensorboard"}  # FLARE's receiver closes its files after the job
        self._note(artifacts={name: os.path.relpath(file, self._record) for name, file in files.items()})

    def _score(self, layers: Layers) -> None:
        """Every site's validation of its final model; then, if the job asks for it, models across sites."""
        scoring = Scoring(
            conductor=self._conductor, schemas=self._schemas, content=self._request_content(), say=self._say
        )
        final, before = scoring.validate(self._rounds.shares, layers, self._rounds.aggregation)
        self._note(final=final, final_before_finetuning=before)
        if self._federation.cross_site:
            for owner in sorted(final.keys() & set(self._training_sites)):
                row = {
                    owner: final[owner].foreground,
                    **scoring.across_sites(owner, self._rounds.shares[owner].model_bytes),
                }
                self._note(cross_site={**self._history.cross_site, owner: row})

    # --- asking the sites -----------------------------------------------------------------------------------------

    def _request_content(self) -> dict[str, Any]:
        alignment = self._sharing_config.alignment
        content = {"run": self.run, "run_id": self._run_id, "job": self._config.to_json(), "alignment": alignment}
        return content | ({"encryption": "bfv"} if self._encryption else {})

    def _ask_every_site(
        self, task: str, question: Mapping[str, Any] | None = None, layers: Layers | None = None
    ) -> dict[str, Message]:
        """Ask all sites the same; each must answer."""
        message = Message(content=self._request_content() | dict(question or {}), layers=layers or {})
        return self._conductor.ask_every(dict.fromkeys(self._sites, (task, message)))

    def _publish(self, record: RoundRecord) -> None:
        """FLARE's analytic events, fired here from the replies: TensorBoard and other receivers listen to them."""
        values = {f"dice/{site}": result.mean_dice for site, result in record.sites.items()}
        values |= {f"train_loss/{site}": result.train_loss for site, result in record.sites.items()}
        values |= {"dice/mean": record.mean_dice, "train_loss/mean": record.mean_train_loss}
        prefix = f"fold_{self._config.fold}/" if len(self._all_folds.folds) > 1 else ""
        for tag, value in values.items():
            dxo = create_analytic_dxo(prefix + tag, value, AnalyticsDataType.SCALAR, global_step=record.round)
            send_analytic_dxo(self, dxo, self._fl_ctx)


def _check_goes_with_encryption(training: TrainingConfig, federation: FederationConfig) -> None:
    for name, holds, expected in (
        ("wire_dtype", training.wire_dtype == "float32", "float32, which encrypted vectors replace"),
        ("cross_site", not federation.cross_site, "false, for models would travel whole and in clear text"),
    ):
        if not holds:
            raise ConfigError(
                field=name, expected=expected, found="another value", remedy="correct the encrypted job's settings"
            )


def _absent(site: str) -> ParticipationError:
    return ParticipationError(
        field="job", expected="the sites that the run began with", found="not connected", remedy="start it", site=site
    )
