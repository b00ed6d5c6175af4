"""A session with the FLARE server: opened when needed, opened again when the server forgot it, always closed."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nvflare.apis.job_def import RunStatus
from nvflare.fuel.flare_api.api_spec import (
    AuthenticationError,
    AuthorizationError,
    InvalidJobDefinition,
    JobNotFound,
    JobNotRunning,
)
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.fuel.utils.config_service import ConfigService

from nnunet_flare.errors import NNUNetFlareError, RefusedError, StateError, UnreachableError
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.flare.results import PROGRESS
from nnunet_flare.flare.series import in_series, series_of
from nnunet_flare.provision.kit import StartupKit
from nnunet_flare.storage import read_json, write_json

__all__ = ["LOST", "AdminSession", "Job", "Progress"]

_CONNECT_SECONDS = 10.0
_COMMAND_SECONDS = 30.0
_LOGIN_TRIES = 2
_SILENCE_SECONDS = 60.0
_NO_JOBS = "no_jobs"
_UNDER_WAY = (RunStatus.DISPATCHED, RunStatus.RUNNING)
LOST = "LOST"
_STORE = Path("transfer") / "results"
_DISK_FULL = os.strerror(errno.ENOSPC)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submission of a run, as the server remembers it.

    Args:
        id: FLARE's.
        run: The job's name, which is its run's.
        status: FLARE's ``RunStatus``, or ``LOST`` for a job that FLARE still calls running though its server was
            restarted since.
        submitted: Time of submission, as FLARE writes it.
        duration: So far, or in all.
        deployment: What each participant said to the deployment, such as ``site-1: OK``.
        series: Name that it shares with the submissions before it, back to a complete one.
    """

    id: str
    run: str
    status: str
    submitted: str = ""
    duration: str = ""
    deployment: tuple[str, ...] = ()
    series: str = ""

    @property
    def has_ended(self) -> bool:
        return self.status == LOST or self.status.startswith("FINISHED:")

    @property
    def is_complete(self) -> bool:
        return self.status == RunStatus.FINISHED_COMPLETED

    def refusals(self) -> tuple[str, ...]:
        """What the participants said that did not take the job."""
        return tuple(text for text in self.deployment if not text.endswith(": OK"))

    def unanswered(self) -> frozenset[str]:
        """Sites that FLARE believed to be connected when the job began, and that were not."""
        return frozenset(text.partition(":")[0] for text in self.refusals() if "timeout" in text)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a running job tells of itself: its sites, and its history's latest rounds."""

    sites: frozenset[str]
    history: RunHistory


class AdminSession:
    """The commands that this package gives to a FLARE server.

    A session that the server no longer knows, after its restart or for idleness, is opened again once.

    Args:
        kit: Of the person on whose behalf.

    Raises:
        UnreachableError: by every command: no answer from the server.
        RefusedError: by every command: the server does not accept the person, or does not allow the command.
        StateError: by every command: a file of this machine cannot be read or written.
    """

    def __init__(self, kit: StartupKit) -> None:
        self.kit = kit
        self._session: Session | None = None

    def __enter__(self) -> AdminSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with _quiet(), contextlib.suppress(Exception):  # a server that is gone needs no good-bye
                session.close()

    def connected_sites(self) -> frozenset[str]:
        """Sites whose last sign of life is not much older than any other's: FLARE lists a dead one for ten minutes."""
        seen = {client.name: client.last_connect_time for client in self._ask("get_system_info").client_info}
        newest = max(seen.values(), default=0.0)
        return frozenset(site for site, when in seen.items() if when > newest - _SILENCE_SECONDS)

    def idle_sites(self, job_id: str, sites: frozenset[str]) -> frozenset[str]:
        """Those of the sites that answer, and do not run the job."""
        if not sites:
            return sites
        answers = self._ask("get_client_job_status", sorted(sites)) or []
        busy = {answer["client_name"] for answer in answers if answer.get("job_id") == job_id}
        awake = {answer["client_name"] for answer in answers if "job_id" in answer or answer["status"] == _NO_JOBS}
        return frozenset(awake - busy)

    def jobs(self, run: str) -> list[Job]:
        """Submissions of the run, newest first."""
        listed = self._ask("list_jobs", name_prefix=run, reverse=True)
        jobs = (self.job(meta["job_id"]) for meta in listed if meta.get("job_name") == run)
        return [job for job in jobs if job is not None]

    def job(self, job_id: str) -> Job | None:
        """The job as it is now; None if the server does not know it."""
        try:
            meta = self._ask("get_job_meta", job_id)
        except JobNotFound:
            return None
        status = meta["status"]
        if status in _UNDER_WAY and self._started_before_the_server(meta.get("start_time", "")):
            status = LOST
        return Job(
            id=job_id,
            run=meta["name"],
            status=status,
            submitted=meta.get("submit_time_iso", ""),
            duration=meta.get("duration", ""),
            deployment=tuple(meta.get("job_deploy_detail") or ()),
            series=series_of(meta),
        )

    def _started_before_the_server(self, start_time: str) -> bool:
        since = self._ask("get_system_info").server_info.start_time
        return bool(start_time) and datetime.fromisoformat(start_time).timestamp() < since

    def submit(self, job_folder: Path, series: str, token: str) -> str:
        """Send a job as one of the series and return its id; the same ``token`` never makes a second job of it."""
        meta = job_folder / "meta.json"
        write_json(meta, in_series(read_json(meta), series))
        job_id: str = self._ask("submit_job", str(job_folder), submit_token=token)
        return job_id

    def progress(self, job_id: str) -> Progress | None:
        """What a running job tells of itself; None before it has begun and after its end.

        FLARE's ``show_stats`` needs no right but ``view``, so whoever may see the job may follow it.
        """
        try:
            answer = self._ask("show_stats", job_id, "server")["server"][PROGRESS]
            return Progress(sites=frozenset(answer["sites"]), history=RunHistory.from_json(answer["history"]))
        except (JobNotFound, JobNotRunning, KeyError, TypeError):  # FLARE's words for a process that does not answer
            return None

    def abort(self, job_id: str) -> None:
        self._ask("abort_job", job_id)

    def download(self, job_id: str) -> Path:
        """The job's folder as FLARE keeps it, brought into the kit's own ``transfer/results/`` once."""
        store = self.kit.folder / _STORE
        if not (store / job_id).is_dir():
            self._ask("download_job_result", job_id, str(store))
        return store / job_id

    def _ask(self, command: str, *arguments: Any, **options: Any) -> Any:
        reopened = self._session is None
        while True:
            try:
                with _quiet():
                    if self._session is None:
                        self._session = self._open()
                    return getattr(self._session, command)(*arguments, **options)
            except (JobNotFound, JobNotRunning):
                raise
            except (AuthorizationError, InvalidJobDefinition) as error:
                raise self._refused(command, str(error)) from error
            except Exception as error:  # FLARE raises many things when the server does not answer as it should
                self.close()
                if reopened or _is_local(error):
                    raise self._failed(command, error) from error
                reopened = True

    def _open(self) -> Session:
        # else FLARE takes a comm_config.json from anywhere below the current folder, and imports what that names
        ConfigService.initialize(section_files={}, config_path=[str(self.kit.folder / "startup")])
        return new_secure_session(
            self.kit.name,
            str(self.kit.folder),
            timeout=_CONNECT_SECONDS,
            command_timeout=_COMMAND_SECONDS,
            auto_login_max_tries=_LOGIN_TRIES,
        )

    def _failed(self, command: str, error: Exception) -> NNUNetFlareError:
        if isinstance(error, AuthenticationError):
            return self._refused(command, str(error))
        if _is_local(error):
            return StateError(
                field=command,
                expected="files of this machine that can be read and written",
                found=getattr(error, "strerror", None) or _DISK_FULL,
                remedy=f"free disk space, see that {self.kit.folder.name} can be written, then try again",
                local_detail=str(error),
            )
        return UnreachableError(
            field=f"FLARE server {self.kit.host}:{self.kit.ports[0]}",
            expected=f"an answer to {command}",
            found=" ".join(str(error).split())[:200] or type(error).__name__,
            remedy="see that the server runs, that its name and port can be reached from here, "
            "and that the kit is of this server and has not expired",
        )

    def _refused(self, command: str, reason: str) -> RefusedError:
        return RefusedError(
            field=command,
            expected=f"a right of {self.kit.name}",
            found=" ".join(reason.split()),
            remedy="ask the project's administrator, or use the kit of a person who may",
        )


def _is_local(error: Exception) -> bool:
    """True for what asking again does not mend; of a disk that a download fills, FLARE tells as text."""
    if isinstance(error, OSError):
        return not isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, RuntimeError) and _DISK_FULL in str(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """FLARE prints and logs what the errors here say in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
