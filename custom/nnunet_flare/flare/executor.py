"""The site's side of a federated nnU-Net training."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.fuel.utils.fobs import FOBSContextKey

from nnunet_flare.aggregation.layers import Layers
from nnunet_flare.errors import NNUNetFlareError, StateError, WorkerError
from nnunet_flare.fingerprint.histogram import from_counts, to_counts
from nnunet_flare.fingerprint.summary import FingerprintSummary
from nnunet_flare.flare import protocol
from nnunet_flare.flare.keys import SiteKeys
from nnunet_flare.flare.protocol import COUNTS, Message
from nnunet_flare.flare.run import RunFolder
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.dataset import RawDataset, find_dataset
from nnunet_flare.nnunet.demo import DEMO_DATASETS
from nnunet_flare.nnunet.network_plan import architecture_plans, plan_digests
from nnunet_flare.nnunet.phantoms import write_demo_dataset
from nnunet_flare.nnunet.process import NNUNetProcess
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.provision.guard import is_guarded
from nnunet_flare.provision.manifest import PolicyManifest

__all__ = ["NNUNetExecutor"]

LOG_FILE = "nnunet.log"
VERSIONED = ("nnunet-flare", "nnunetv2", "torch")
_BAR_SECONDS = 10.0
_FETCH_SECONDS = 120.0


class NNUNetExecutor(Executor):
    """Answers every task of the protocol; each task name is a method.

    Nothing is remembered between tasks that is not also on disk, because FLARE may run each task in a new process.
    nnU-Net works in a child process; an error in it, or its death, is answered with an error reply and the site takes
    part in the next round again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._process: NNUNetProcess | None = None
        self._run: RunFolder | None = None
        self._layers_sent, self._fetched = False, threading.Event()
        self._tasks: Mapping[str, Callable[[Message, Calls], Message]] = {
            protocol.DESCRIBE: self._describe,
            protocol.EXTRACT_FINGERPRINT: self._extract_fingerprint,
            protocol.PLAN: self._plan,
            protocol.PLAN_LOCALLY: self._plan_locally,
            protocol.LAYER_SIGNATURE: self._layer_signature,
            protocol.TRAIN: self._train,
            protocol.EVALUATE: self._evaluate,
            protocol.VALIDATE: self._validate,
            protocol.FINAL_MODEL: self._final_model,
            protocol.SCORE_MODEL: self._score_model,
            protocol.CERTIFICATE: self._certificate,
            protocol.MAKE_KEY: self._make_key,
            protocol.RECEIVE_KEY: self._receive_key,
            protocol.FORGET_KEY: self._forget_key,
        }

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        # The server fetches the layers after it has the reply; FLARE's simulator may end this process before that.
        waits = self._layers_sent and fl_ctx.get_prop(FLContextKey.SIMULATE_MODE)
        if event_type == EventType.BEFORE_SEND_TASK_RESULT and waits:
            self._fetched.clear()
            fl_ctx.get_engine().get_cell().update_fobs_context(
                {FOBSContextKey.DOWNLOAD_COMPLETE_CB: lambda *_: self._fetched.set()}
            )
        elif event_type == EventType.AFTER_SEND_TASK_RESULT and waits:
            self._fetched.wait(_FETCH_SECONDS)
        elif event_type == EventType.END_RUN:
            self._close()

    def _close(self) -> None:
        if self._process is not None:
            self._process.close()
        if self._run is not None:
            self._run.close()
        self._process = self._run = None

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Do one task. Whatever goes wrong is answered in the fixed error schema; details stay in this site's log."""
        site = fl_ctx.get_identity_name()
        try:
            request = protocol.read_message(shareable, sender="server")
            calls = self._open(request, fl_ctx, abort_signal)
            reply = self._tasks[task_name](request, calls)
        except NNUNetFlareError as error:
            error.site = site
            reply = self._report(error, error.local_detail, fl_ctx)
        except Exception as error:  # the boundary between this site and the federation
            reply = self._report(_unexpected(task_name, error, site), traceback.format_exc(), fl_ctx)
        self._layers_sent = bool(reply.layers)
        return reply.to_shareable()

    def _report(self, error: NNUNetFlareError, detail: str, fl_ctx: FLContext) -> Message:
        """Answer with the error; its details go to the run's own log, for FLARE may stream its logs to the server."""
        self.log_error(fl_ctx, str(error), fire_event=False)
        if self._run is not None and detail:
            # A full disk is among the errors that must still be told.
            with contextlib.suppress(OSError), (self._run.path / LOG_FILE).open("a") as log:
                log.write(f"{error}\n{detail}\n")
        return protocol.error_message(error)

    def _open(self, request: Message, fl_ctx: FLContext, abort_signal: Signal) -> Calls:
        """Bind the request's run, this site's settings and the nnU-Net process together."""
        site = fl_ctx.get_identity_name()
        config = TrainingConfig.from_json(request.content["job"])
        workspace = fl_ctx.get_engine().get_workspace()
        local, self._kit = Path(workspace.get_site_config_dir()), Path(workspace.get_root_dir())
        settings = _with_demo_data(SiteSettings.load(site, local).with_dataset(config.dataset))
        if self._run is None:
            self._run = RunFolder(settings.folder, request.content["run"])
            self._run.follow(request.content["run_id"], request.content["job"])
        if self._process is None:
            threads = settings.num_threads or max(1, (os.cpu_count() or 1) // _clients_on_this_machine(fl_ctx))
            self._process = NNUNetProcess(log_file=self._run.path / LOG_FILE, num_threads=threads)
        if "encryption" in request.content:
            self._keys = SiteKeys.of(request.content, fl_ctx)
        return Calls(self._process, settings, self._run.path, request, lambda: abort_signal.triggered, self.logger)

    def _describe(self, request: Message, calls: Calls) -> Message:
        """The schema of the site's data, its role, and the versions that must fit."""
        settings = calls.settings
        if is_guarded(self._kit):
            PolicyManifest.check(self._kit)
        schema = RawDataset.read(find_dataset(settings.raw_root, settings.dataset)).schema
        versions = {"python": ".".join(platform.python_version_tuple()[:2])}
        versions |= {name: version(name).partition("+")[0] for name in VERSIONED}
        content = {"schema": schema.to_json(), "role": settings.role, "versions": versions}
        return Message(content=content | {"min_sites_in_sum": settings.min_sites_in_sum})

    def _certificate(self, request: Message, calls: Calls) -> Message:
        """Who this site is towards its peers, and the key of the run that it holds already."""
        key = self._keys.key().id if self._keys.has_key else None
        return Message(content={"certificate": self._keys.identity.pem, "key": key})

    def _make_key(self, request: Message, calls: Calls) -> Message:
        """Key holder: the run's key, sealed for each peer; the server can open none of the envelopes."""
        key, envelopes = self._keys.make(request.content["parameters"], request.content["certificates"])
        return Message(content={"key": key, "envelopes": envelopes})

    def _receive_key(self, request: Message, calls: Calls) -> Message:
        return Message(content={"key": self._keys.receive(request.content["envelope"])})

    def _forget_key(self, request: Message, calls: Calls) -> Message:
        self._keys.destroy()
        return Message()

    def _extract_fingerprint(self, request: Message, calls: Calls) -> Message:
        """The fingerprint of a site that trains; one that only evaluates has its cases checked and tells nothing."""
        names = ("num_foreground_voxels", "num_cases_total")
        settings = calls.settings.to_json()
        reply = calls.run("extract", settings=settings, **{name: request.content[name] for name in names})
        if calls.settings.role != "train":
            return Message()
        if "encryption" in request.content:
            counts = to_counts(FingerprintSummary.from_json(reply.content["summary"]))
            return Message(layers={COUNTS: counts.astype(np.float64)})
        return reply

    def _plan(self, request: Message, calls: Calls) -> Message:
        """Plan from the merged fingerprint; of an encrypted one, no more than the network is told."""
        if "encryption" not in request.content:
            return calls.run("plan", **calls.task(), summary=request.content["summary"])
        counts = request.layers[COUNTS].astype(np.int64)
        summary = from_counts(counts, num_channels=request.content["num_channels"]).to_json()
        plans = calls.run("plan", layers={}, **calls.task(), summary=summary).content["plans"]
        configuration = request.content["job"]["configuration"]
        content = {"plans": architecture_plans(plans, configuration), "digests": plan_digests(plans, configuration)}
        return Message(content=content)

    def _plan_locally(self, request: Message, calls: Calls) -> Message:
        return calls.run("plan_locally", **calls.task())

    def _layer_signature(self, request: Message, calls: Calls) -> Message:
        return calls.run("prepare", **calls.training())

    def _train(self, request: Message, calls: Calls) -> Message:
        return calls.run("train", **calls.training(), round_number=request.content["round"])

    def _evaluate(self, request: Message, calls: Calls) -> Message:
        return calls.run("evaluate", **calls.training(), round_number=request.content["round"])

    def _validate(self, request: Message, calls: Calls) -> Message:
        return calls.run("validate", **calls.training())

    def _final_model(self, request: Message, calls: Calls) -> Message:
        return calls.run("final_model", **calls.training())

    def _score_model(self, request: Message, calls: Calls) -> Message:
        model = {name: request.content[name] for name in ("plans", "dataset_json")}
        return calls.run("score_model", **calls.training(), **model)


class Calls:
    """One task's way into the nnU-Net process."""

    def __init__(
        self,
        process: NNUNetProcess,
        settings: SiteSettings,
        run: Path,
        request: Message,
        cancelled: Callable[[], bool],
        logger: logging.Logger,
    ) -> None:
        self.process, self.settings = process, settings
        self._run, self._request, self._cancelled, self._logger = run, request, cancelled, logger
        self._bar_shown = time.monotonic()

    def task(self) -> dict[str, Any]:
        """The arguments that every command of a run takes."""
        return {"settings": self.settings.to_json(), "job": self._request.content["job"], "run": str(self._run)}

    def training(self) -> dict[str, Any]:
        """The arguments that every command on a training takes."""
        return self.task() | {"alignment": self._request.content["alignment"]}

    def run(self, command: str, *, layers: Layers | None = None, **arguments: Any) -> Message:
        """Run a command with layers, by default the request's, and return its answer as a reply."""
        content, layers = self.process.call(
            command,
            arguments,
            self._request.layers if layers is None else layers,
            cancelled=self._cancelled,
            progress=self._show_progress,
        )
        return Message(content=content, layers=layers, difference=self._request.content.get("update") == "difference")

    def _show_progress(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._bar_shown > _BAR_SECONDS:
            self._bar_shown = time.monotonic()
            filled = round(20 * done / total)
            bar = "#" * filled + "." * (20 - filled)
            self._logger.info(f"{self.settings.site}  {what} [{bar}] {done} of {total}")


def _with_demo_data(settings: SiteSettings) -> SiteSettings:
    if settings.dataset not in DEMO_DATASETS:
        return settings
    raw_root = settings.folder / "nnUNet_raw"
    folder = write_demo_dataset(raw_root, settings.site, dataset=settings.dataset)
    return replace(settings, dataset=folder.name, nnunet_raw=raw_root)


def _clients_on_this_machine(fl_ctx: FLContext) -> int:
    """All clients of the job in the simulator, else this one."""
    if not fl_ctx.get_prop(FLContextKey.SIMULATE_MODE):
        return 1
    meta = fl_ctx.get_prop(FLContextKey.JOB_META) or {}
    return max(1, len(meta.get(JobMetaKey.JOB_CLIENTS.value) or []))


def _unexpected(task_name: str, error: Exception, site: str) -> NNUNetFlareError:
    if isinstance(error, OSError) and error.errno is not None:
        return StateError(
            field=task_name,
            expected="files that can be read and written",
            found=os.strerror(error.errno),
            remedy="free disk space or correct the permissions, then submit the job again",
            site=site,
        )
    return WorkerError(
        field=task_name,
        expected="a result",
        found=type(error).__name__,
        remedy="see nnunet.log in the site's run folder",
        site=site,
    )
