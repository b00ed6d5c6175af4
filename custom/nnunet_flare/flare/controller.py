"""The server's side: the phases of a federated nnU-Net training, each ending with a record on disk."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo

from nnunet_flare.aggregation.layers import Layers, Signature, apply_update, check_layers, signature_of
from nnunet_flare.aggregation.weighted_sum import WeightedSum
from nnunet_flare.errors import ConfigError, LayerMismatchError, NNUNetFlareError, ParticipationError, UpdateError
from nnunet_flare.flare import protocol
from nnunet_flare.flare.conductor import Participation, RunStoppedError, ask_sites
from nnunet_flare.flare.config import FederationConfig
from nnunet_flare.flare.curves import CURVES_FILE, draw_learning_curves
from nnunet_flare.flare.history import CSV_FILE, JSON_FILE, RoundRecord, RunHistory, SiteFinal, SiteRound
from nnunet_flare.flare.protocol import Message
from nnunet_flare.flare.replies import SiteDescription, SiteLayers, cast, site_final, site_round
from nnunet_flare.flare.run import RunFolder
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.process import NNUNetProcess
from nnunet_flare.nnunet.schema import check_schemas_match, dataset_json
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.storage import read_json

__all__ = ["FederatedTraining"]

SERVER = "server"
TENSORBOARD_FOLDER = "tb_events"


class FederatedTraining(Controller, ABC):
    """Describe, plan, agree on layers, average over rounds, validate: what every federated nnU-Net training does.

    How the sites come to their plans is the subclass's matter. The job ends as failed, with the reason, on everything
    that the remaining sites cannot mend.

    Args:
        run: Name of the run; a run of the same name that has not finished is continued.
        training: Settings of ``TrainingConfig`` that differ from its defaults.
        federation: Settings of ``FederationConfig`` that differ from its defaults.
    """

    def __init__(
        self, run: str, training: dict[str, Any] | None = None, federation: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.run, self.training, self.federation = run, training, federation
        self._config = TrainingConfig.from_json(training or {})
        self._federation = FederationConfig.from_json(federation or {})

    def start_controller(self, fl_ctx: FLContext) -> None:
        """FLARE's hook; the run's folder is opened in ``control_flow``, where a failure can end the job."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """FLARE's hook; ``control_flow`` cleans up behind itself."""

    def process_result_of_unknown_task(self, client, task_name, client_task_id, result, fl_ctx) -> None:
        """A reply after its deadline: the site was left out of that round."""
        self.log_info(fl_ctx, f"{client.name} answered {task_name} too late", fire_event=False)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.END_RUN:
            run_folder = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
            if (run_folder / TENSORBOARD_FOLDER).is_dir() and hasattr(self, "_folder"):
                shutil.copytree(run_folder / TENSORBOARD_FOLDER, self._folder / "tensorboard", dirs_exist_ok=True)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        self._fl_ctx, self._abort_signal = fl_ctx, abort_signal
        run = process = None
        try:
            local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
            settings = SiteSettings.load(SERVER, local)
            run = RunFolder(settings.folder, self.run)
            self._open(run, settings)
            process = self._process = NNUNetProcess(log_file=run.path / "nnunet.log", num_threads=1)
            self._conduct()
        except RunStoppedError:
            self.log_info(fl_ctx, "the job was stopped; submit it again to continue the run")
        except NNUNetFlareError as error:
            if abort_signal.triggered:
                self.log_info(fl_ctx, "the job was stopped; submit it again to continue the run")
            else:
                self._fail(str(error), error.local_detail)
        except OSError as error:
            self._fail(f"server: {error.strerror or type(error).__name__}; free disk space, then submit again", "")
        finally:
            if process is not None:
                process.close()
            if run is not None:
                run.close()

    def _open(self, run: RunFolder, settings: SiteSettings) -> None:
        identity = {name: value for name, value in self._config.to_json().items() if name != "stop_after"}
        self._run, self._settings = run, settings
        if not (run.path / JSON_FILE).exists():
            self._pretrained()  # a new run with a misspelt checkpoint ends before it is one
        self._run_id = run.begin(identity)
        self._folder = run.path
        if (self._folder / JSON_FILE).exists():
            self._history = RunHistory.load(self._folder)
        else:
            self._history = RunHistory(
                run_name=self.run, run_id=self._run_id, num_rounds=self._config.num_rounds, started=time.time()
            )

    def _fail(self, reason: str, detail: str) -> None:
        self.log_error(self._fl_ctx, f"{reason} {detail}".strip(), fire_event=False)
        if hasattr(self, "_history"):
            self._note(phase="failed", error=reason)
        self.system_panic(reason, self._fl_ctx)

    def _note(self, **changes: Any) -> None:
        self._history = self._history.changed(**changes)
        self._history.save(self._folder)

    def _say(self, text: str) -> None:
        self.log_info(self._fl_ctx, text, fire_event=False)

    # --- the phases -----------------------------------------------------------------------------------------------

    @abstractmethod
    def _planning_phases(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        """Name and method of each phase that leads to ``self._plans``, in order; a job may stop after any of them."""

    def _conduct(self) -> None:
        self._describe()
        for stage, phase in (*self._planning_phases(), ("preprocess", self._agree_on_layers)):
            self._note(phase=stage)
            phase()
            if stage == self._config.stop_after:
                self._note(phase="done")
                self._say(f"stopped after {stage}, as the job says; without stop_after the run continues from here")
                return
        layers = self._train()
        self._note(phase="validate")
        self._process.start()
        self._export(layers)
        self._validate(layers)
        self._run.finish()
        self._note(phase="done")
        self._say(f"done: {self._folder}")

    def _describe(self) -> None:
        """Who takes part, and whether their data and versions fit, before anything is computed."""
        self._note(phase="describe", error="")
        sites = sorted(client.name for client in self._fl_ctx.get_engine().get_clients())
        self._sites = dict.fromkeys(sites, "")
        replies = self._ask_every_site(protocol.DESCRIBE)
        described = {site: cast(site, reply, SiteDescription.parse) for site, reply in replies.items()}
        self._sites = {site: description.role for site, description in described.items()}
        _check_versions({site: description.versions for site, description in described.items()})
        schemas = {site: description.schema for site, description in described.items()}
        check_schemas_match(schemas)
        self._training_sites = [site for site, role in self._sites.items() if role == "train"]
        self._min_sites = self._federation.min_sites or len(self._training_sites)
        self._require(len(self._training_sites), "sites that train", {})
        self._num_cases = {site: schemas[site].num_training for site in self._training_sites}
        self._dataset_json = dataset_json(schemas[self._training_sites[0]], sum(self._num_cases.values()))
        cases = ", ".join(f"{site} {number} cases" for site, number in self._num_cases.items())
        self._say(f"run {self.run}: {len(self._sites)} sites ({cases})")
        if len(self._training_sites) == 1:
            self._say("only one site trains: this is no federation; set min_sites to wait for the others")

    def _agree_on_layers(self) -> None:
        """Every site preprocesses and opens its training; its network must have exactly the common layers."""
        self._start = self._run.load_global()
        if self._start is None:
            self._process.start()  # imports torch while the sites preprocess
        replies = self._ask_every_site(protocol.LAYER_SIGNATURE)
        opened = {site: cast(site, reply, SiteLayers.parse) for site, reply in replies.items()}
        if self._start is None:
            self._start = 0, self._initial_layers()
            self._run.save_global(*self._start)
        signature = signature_of(self._start[1])
        for site, layers in opened.items():
            _check_signature(site, layers.signature, signature)
        self._shared = dict.fromkeys(self._sites, signature)
        by_cases = self._config.weighting == "cases"
        self._weights = {site: opened[site].num_training_cases if by_cases else 1 for site in self._training_sites}
        millions = sum(array.size for array in self._start[1].values()) / 1e6
        self._say(f"{len(signature)} layers, {millions:.1f} million parameters")

    def _initial_layers(self) -> dict[str, np.ndarray]:
        _, layers = self._process.call(
            "initial_layers",
            {
                "job": self._config.to_json(),
                "plans": self._plans,
                "dataset_json": self._dataset_json,
                "pretrained": self._pretrained(),
            },
            cancelled=lambda: self._abort_signal.triggered,
        )
        self._process.close()
        return layers

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
            layers, record = self._train_round(round_number, layers)
            self._history = self._history.with_round(record)
            self._history.save(self._folder)
            self._run.save_global(round_number + 1, layers)
            self._publish(record)
            self._say(self._history.progress_line(record))
        return layers

    def _train_round(self, round_number: int, layers: Layers) -> tuple[Layers, RoundRecord]:
        """Federated averaging (McMahan et al. 2017, Algorithm 1): layers down, local epochs, weighted mean."""
        difference = self._config.update == "difference"
        wire = {name: array.astype(self._config.wire_dtype, copy=False) for name, array in layers.items()}
        content = self._request_content() | {"round": round_number, "update": self._config.update}
        requests = {
            site: Message(content=content, layers={name: wire[name] for name in shared})
            for site, shared in self._shared.items()
        }
        tasks = {"train": protocol.TRAIN, "evaluate": protocol.EVALUATE}
        total = WeightedSum(total_weight=sum(self._weights.values()))
        results: dict[str, SiteRound] = {}
        started = time.monotonic()

        def accept(site: str, reply: Message) -> None:
            role, seconds = self._sites[site], time.monotonic() - started
            downloaded = protocol.layer_bytes(requests[site].layers)
            result = cast(site, reply, lambda content: site_round(role, reply, downloaded, seconds))
            if role == "train":
                check_layers(reply.layers, self._shared[site], site=site)
                if reply.difference != difference:
                    raise UpdateError(
                        field="update",
                        expected=self._config.update,
                        found="the other kind of layers",
                        remedy="remove filters that change the kind of update",
                        site=site,
                    )
                total.add(reply.layers, weight=self._weights[site])
            results[site] = result

        outcome = self._ask(
            {site: (tasks[role], requests[site]) for site, role in self._sites.items()}, accept, "round"
        )
        for error in outcome.failures.values():
            self._say(f"left out of round {round_number + 1}: {error}")
        trained = [site for site in results if self._sites[site] == "train"]
        self._require(len(trained), f"updates in round {round_number + 1}", outcome.failures)
        record = RoundRecord(
            round=round_number + 1,
            sites=results,
            missing={site: str(error) for site, error in outcome.failures.items()},
            seconds=time.monotonic() - started,
        )
        mean = total.mean()
        return (apply_update(layers, mean) if difference else mean), record

    def _export(self, layers: Layers) -> None:
        """The global model, predict-ready, and the learning curves; before any site's validation can fail."""
        self._process.call(
            "export_model",
            {
                "job": self._config.to_json(),
                "plans": self._plans,
                "dataset_json": self._dataset_json,
                "fingerprint": read_json(self._folder / "dataset_fingerprint.json"),
                "folder": str(self._folder / "model"),
            },
            layers,
            cancelled=lambda: self._abort_signal.triggered,
        )
        draw_learning_curves(self._history, self._folder / CURVES_FILE)
        artifacts = {
            "model": "model",
            "plans": "plans.json",
            "fingerprint": "dataset_fingerprint.json",
            "curves": CURVES_FILE,
            "metrics": JSON_FILE,
            "table": CSV_FILE,
            "tensorboard": "tensorboard",
        }
        self._note(artifacts=artifacts)

    def _validate(self, layers: Layers) -> None:
        """Final sync: every site keeps the final model and scores it on its validation cases."""
        message = Message(content=self._request_content(), layers=layers)
        final: dict[str, SiteFinal] = {}

        def accept(site: str, reply: Message) -> None:
            final[site] = cast(site, reply, site_final)

        outcome = self._ask(dict.fromkeys(self._sites, (protocol.VALIDATE, message)), accept, "phase")
        for error in outcome.failures.values():
            self._say(f"no validation: {error}")
        self._note(final=dict(sorted(final.items())))
        self._require(len(final), "validations of the final model", outcome.failures)

    # --- asking the sites -----------------------------------------------------------------------------------------

    def _request_content(self) -> dict[str, Any]:
        return {"run": self.run, "run_id": self._run_id, "job": self._config.to_json()}

    def _ask(
        self, requests: Mapping[str, tuple[str, Message]], accept: Callable[[str, Message], None], kind: str
    ) -> Participation:
        timeout_s = getattr(self._federation, f"{kind}_timeout_s")
        return ask_sites(
            self, requests, accept, timeout_s=timeout_s, fl_ctx=self._fl_ctx, abort_signal=self._abort_signal
        )

    def _ask_every_site(
        self,
        task: str,
        question: Mapping[str, Any] | None = None,
        *,
        layers: Layers | None = None,
        sites: list[str] | None = None,
    ) -> dict[str, Message]:
        """Ask for something that every site must deliver.

        Raises:
            NNUNetFlareError: the first site's error; all of them are in the server's log.
        """
        message = Message(content=self._request_content() | dict(question or {}), layers=layers or {})
        replies: dict[str, Message] = {}
        asked = sites or list(self._sites)
        outcome = self._ask(dict.fromkeys(asked, (task, message)), replies.__setitem__, "phase")
        for site in sorted(outcome.failures):
            self._say(f"{task}: {outcome.failures[site]}")
        if outcome.failures:
            raise outcome.failures[min(outcome.failures)]
        return {site: replies[site] for site in asked}

    def _require(self, number: int, what: str, failures: Mapping[str, NNUNetFlareError]) -> None:
        needed = max(1, getattr(self, "_min_sites", 1))
        if number < needed:
            reasons = "; ".join(str(error) for error in failures.values())
            raise ParticipationError(
                field=what,
                expected=f"at least {needed}",
                found=f"{number} ({reasons})" if reasons else str(number),
                remedy="mend the sites named, or lower min_sites, then submit again: the run continues from here",
            )

    def _publish(self, record: RoundRecord) -> None:
        """FLARE's analytic events, fired here from the replies: TensorBoard and other receivers listen to them."""
        values = {f"dice/{site}": result.mean_dice for site, result in record.sites.items()}
        values |= {f"train_loss/{site}": result.train_loss for site, result in record.sites.items()}
        values |= {"dice/mean": record.mean_dice, "train_loss/mean": record.mean_train_loss}
        for tag, value in values.items():
            dxo = create_analytic_dxo(tag, value, AnalyticsDataType.SCALAR, global_step=record.round)
            send_analytic_dxo(self, dxo, self._fl_ctx)


def _check_versions(versions: Mapping[str, Mapping[str, str]]) -> None:
    """nnU-Net and this package must be the same everywhere; torch and Python may differ."""
    first = min(versions)
    for package in ("nnunet-flare", "nnunetv2"):
        for site, found in versions.items():
            if found.get(package) != versions[first].get(package):
                raise ConfigError(
                    field=f"version of {package}",
                    expected=f"{versions[first].get(package)} (as at {first})",
                    found=str(found.get(package)),
                    remedy="install the same version at every site",
                    site=site,
                )


def _check_signature(site: str, signature: Signature, expected: Signature) -> None:
    for name in sorted(signature.keys() | expected.keys()):
        if signature.get(name) != expected.get(name):
            raise LayerMismatchError(
                field=f"layer {name}",
                expected=f"shape {expected.get(name, 'absent')}",
                found=f"shape {signature.get(name, 'absent')}",
                remedy="use the same trainer and plans at every site",
                site=site,
            )
