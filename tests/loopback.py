"""A federation in one process: the real controller and executors, with FLARE's messaging left out.

Messages still go through FLARE's serialization (FOBS), so that nothing passes here that could not travel.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, TaskCompletionStatus
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.fuel.utils import fobs
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize

from nnunet_flare.flare.controller import FederatedTraining
from nnunet_flare.flare.executor import NNUNetExecutor
from nnunet_flare.flare.ffe import FFEController
from nnunet_flare.flare.filters import BFVDecryptFilter, BFVEncryptFilter
from nnunet_flare.flare.series import in_series

nvflare_fobs_initialize()

Tamper = Callable[[str, str, Shareable], Shareable | None]


class Loopback:
    """Runs jobs over the given sites.

    Args:
        folder: Holds each participant's ``local`` folder.
        sites: Names of the sites.
        tamper: Called with site, task name and reply; what it returns arrives instead, None never arrives.

    With ``job_folder``, where FLARE would keep a submitted job, jobs count as submitted, and as ones of ``series``.
    Sites in ``policy_filters`` have the filters of encryption whatever the job says.
    """

    def __init__(self, folder: Path, sites: tuple[str, ...], tamper: Tamper = lambda site, task, reply: reply) -> None:
        self.folder, self.sites, self.tamper = folder, sites, tamper
        self.job_folder: Path | None = None
        self.series = ""
        self.policy_filters: set[str] = set()
        self.panics: list[str] = []
        self.scalars: dict[str, list[float]] = {}
        self.sent: list[tuple[str, str, bytes, bytes]] = []

    def run(
        self,
        run: str = "test",
        training: dict | None = None,
        federation: dict | None = None,
        sharing: Any = None,
        kind: type[FederatedTraining] = FFEController,
        encryption: dict | None = None,
    ) -> FederatedTraining:
        """One submission of the job; ``panics`` then holds why it failed, if it did."""
        self.panics.clear()
        controller = kind(run, training, federation, sharing, encryption)
        executors = {site: NNUNetExecutor() for site in self.sites}
        abort = Signal()

        def send(task, fl_ctx, targets):
            threading.Thread(target=try_to_work, args=(task, targets[0]), daemon=True).start()

        def try_to_work(task, site):
            try:
                work(task, site)
            except BaseException as error:
                broken.append(error)
                task.completion_status = TaskCompletionStatus.ERROR

        def work(task, site):
            request = fobs.dumps(task.data)
            context = self._context(site)
            context.set_prop(FLContextKey.TASK_NAME, task.name, private=True, sticky=False)
            context.set_prop(FLContextKey.TASK_ID, str(uuid.uuid4()), private=True, sticky=False)
            data = fobs.loads(request)
            filters = [site in self.policy_filters, encryption is not None]  # the site's own, then those of the job
            for _ in filter(None, filters):
                data = BFVDecryptFilter().process(data, context)
            reply = executors[site].execute(task.name, data, context, abort)
            for _ in filter(None, filters):
                reply = BFVEncryptFilter().process(reply, context)
            answer = fobs.dumps(reply)
            self.sent.append((site, task.name, request, answer))
            arrived = self.tamper(site, task.name, fobs.loads(answer))
            if arrived is None:
                task.completion_status = TaskCompletionStatus.TIMEOUT
                return
            client_task = ClientTask(Client(site, ""), task)
            client_task.result = arrived
            with lock:
                task.result_received_cb(client_task=client_task, fl_ctx=self._context("server"))
            task.completion_status = TaskCompletionStatus.OK

        lock, broken = threading.Lock(), []
        controller.send = send
        try:
            controller.control_flow(abort, self._context("server"))
        finally:
            for site, executor in executors.items():
                executor.handle_event(EventType.END_RUN, self._context(site))
            if broken:
                raise broken[0]
        return controller

    def _context(self, name: str) -> FLContext:
        local = self.folder / name / "local"
        local.mkdir(parents=True, exist_ok=True)
        workspace = SimpleNamespace(
            get_site_config_dir=lambda: str(local),
            get_root_dir=lambda: str(local),
            get_run_dir=lambda job_id: str(self.job_folder),
        )
        clients = [Client(site, "") for site in self.sites]
        cell = SimpleNamespace(decode_pass_through_topics=set())
        engine = SimpleNamespace(
            get_workspace=lambda: workspace,
            get_clients=lambda: clients,
            server=SimpleNamespace(command_agent=SimpleNamespace(cell=cell)),
            fire_event=self._hear,
        )
        context = FLContext()
        context.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=False)
        context.set_prop(ReservedKey.IDENTITY_NAME, name, private=False, sticky=False)
        context.set_prop(FLContextKey.SIMULATE_MODE, self.job_folder is None, private=True, sticky=False)
        context.set_prop(FLContextKey.JOB_META, in_series({}, self.series), private=True, sticky=False)
        return context

    def _hear(self, event_type: str, fl_ctx: FLContext) -> None:
        data = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
        if event_type == EventType.FATAL_SYSTEM_ERROR:
            self.panics.append(data)
        elif event_type == "analytix_log_stats":
            content = data["DXO"]["data"]
            self.scalars.setdefault(content["track_key"], []).append(content["track_value"])
