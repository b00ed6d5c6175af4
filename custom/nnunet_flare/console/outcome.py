"""How a job ended, and whether trying again can mend it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from nvflare.apis.job_def import RunStatus

from nnunet_flare.console.session import LOST, AdminSession, Job
from nnunet_flare.errors import (
    ConfigError,
    DatasetError,
    DecryptionError,
    EncryptionError,
    LayerMismatchError,
    NNUNetFlareError,
    ParticipationError,
    PlansError,
    PolicyError,
    RefusedError,
    StateError,
    WorkerError,
    error_from_reply,
)
from nnunet_flare.flare.history import JSON_FILE, RunHistory
from nnunet_flare.flare.results import OUTCOME_FILE, RESULTS_FOLDER
from nnunet_flare.storage import read_json

__all__ = ["Outcome", "can_be_mended", "judge", "read_outcome", "results_in"]

_FINAL = (
    ConfigError,
    DatasetError,
    DecryptionError,
    EncryptionError,
    LayerMismatchError,
    PlansError,
    PolicyError,
    RefusedError,
)
"""What somebody has to correct first; a site or process that was lost may be back."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a job.

    Args:
        error: What ended it before its run; None if the run is complete.
        history: The run as the job left it, where it left anything.
        results: Folder of the results of a complete run.
    """

    error: NNUNetFlareError | None = None
    history: RunHistory | None = None
    results: Path | None = None


def can_be_mended(error: NNUNetFlareError) -> bool:
    """True if the same job may fare better another time; a defect, which has no kind of its own, comes again."""
    return type(error) is not NNUNetFlareError and not isinstance(error, _FINAL)


def read_outcome(session: AdminSession, job: Job | None) -> Outcome:
    """Download what the job left, and judge it; a failed job's download is removed again.

    Raises:
        UnreachableError: no answer from the server.
        StateError: the job is complete, and has no results.
    """
    if job is None or job.status in (LOST, RunStatus.FAILED_TO_RUN):
        return Outcome(error=judge(job))
    try:
        download = session.download(job.id)
    except RefusedError:  # who may see a job may not always have its results
        return Outcome(error=judge(job))
    if job.is_complete:
        return Outcome(results=results_in(download))
    results = download / "workspace" / RESULTS_FOLDER
    try:
        left = read_json(results / OUTCOME_FILE) if (results / OUTCOME_FILE).exists() else {}
        reason = error_from_reply(left["error"]) if left.get("error") else None
        histories = [RunHistory.load(file.parent) for file in results.rglob(JSON_FILE)]
        latest = max(histories, key=lambda history: history.updated, default=None)
        return Outcome(error=judge(job, reason), history=latest)
    finally:
        shutil.rmtree(download)


def results_in(download: Path) -> Path:
    """The folder of results in what a complete job left.

    Raises:
        StateError: there is none.
    """
    results = download / "workspace" / RESULTS_FOLDER
    if not (results / OUTCOME_FILE).is_file():
        raise StateError(
            field=f"job {download.name}",
            expected="the results of a complete job",
            found="none in what the server keeps of it",
            remedy="look into the server's log; the run itself is in the server's folder of runs",
            local_detail=str(download),
        )
    return results


def judge(job: Job | None, reason: NNUNetFlareError | None = None) -> NNUNetFlareError | None:
    """Why a job ended before its run: its own ``reason``, or what FLARE's status tells."""
    if job is None or job.status == LOST:
        return StateError(
            field="job",
            expected="a job that the server runs",
            found="none: the server was restarted",
            remedy="submit it again: the run continues from its last round",
        )
    if job.is_complete or reason is not None:
        return reason
    if job.status == RunStatus.FINISHED_ABORTED:
        return RefusedError(
            field=f"job {job.id}",
            expected="a run to its end",
            found="stopped by a person",
            remedy="submit it again: the run continues from its last round",
        )
    refusals = job.refusals()
    if job.status == RunStatus.FAILED_TO_RUN:
        kind = ParticipationError if all("timeout" in text for text in refusals) else RefusedError
        return kind(
            field=f"deployment of job {job.id}",
            expected="sites that accept the job",
            found="; ".join(refusals) or job.status,
            remedy="see the logs of the sites named",
        )
    return WorkerError(
        field=f"job {job.id}",
        expected="a run to its end",
        found=f"a process of the job was lost at the server or at a site ({job.status})",
        remedy="submit it again: the run continues from its last round",
    )
