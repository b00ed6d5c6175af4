"""What ``submit``, ``status``, ``fetch`` and ``stop`` do from a person's start-up kit; each returns the exit status."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nnunet_flare.console.fetch import MODEL_FOLDER, fetch_results
from nnunet_flare.console.outcome import Outcome, read_outcome
from nnunet_flare.console.session import AdminSession
from nnunet_flare.console.submission import prepare_job
from nnunet_flare.console.supervisor import Clock, Console, Supervisor
from nnunet_flare.errors import StateError
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.provision.kit import StartupKit
from nnunet_flare.report.status import history_text, status_text

__all__ = ["fetch", "show_status", "stop", "stop_jobs", "submit"]

_STOP_SECONDS = 60.0


def submit(kit: Path, job_folder: Path, *, follow: bool, retries: int, wait_s: float) -> int:
    with tempfile.TemporaryDirectory() as workspace, _session(kit) as session:
        job = prepare_job(job_folder, Path(workspace))
        supervisor = Supervisor(session, partial(read_outcome, session), _say, retries=retries, wait_s=wait_s)
        job_id = supervisor.submit(job)
        if not (follow or retries):
            print(f"nnunet-flare status {job.run} --kit {kit} --follow")
            return 0
        return _until_the_end(partial(supervisor.see_through, job, job_id), job.run, kit)


def show_status(kit: Path, run: str, *, follow: bool) -> int:
    with _session(kit) as session:
        jobs = session.jobs(run)
        if not jobs:
            raise StateError(field=f"run {run}", expected="a job", found="none of that name", remedy="submit it first")
        for job in jobs:
            print(f"{job.id}  {job.submitted[:19]}  {job.status}")
        newest = jobs[0]
        if follow and not newest.has_ended:
            supervisor = Supervisor(session, partial(read_outcome, session), _say)
            return _until_the_end(partial(supervisor.follow, newest.id), run, kit)
        print()
        if not newest.has_ended:
            progress = session.progress(newest.id)
            print(history_text(progress.history) if progress else "no progress yet")
            return 0
        outcome = read_outcome(session, session.job(newest.id))
        if outcome.results is not None:
            print(status_text(outcome.results, with_artifacts=False))
        elif outcome.history is not None:
            print(history_text(outcome.history))
        if outcome.error is not None:
            print(outcome.error)
    return 0


def _until_the_end(follow: Callable[[], Outcome], run: str, kit: Path) -> int:
    try:
        outcome = follow()
    except KeyboardInterrupt:
        print(f"\nthe job goes on, and is not submitted again; nnunet-flare status {run} --kit {kit} --follow")
        return 130
    if outcome.error is not None:
        raise outcome.error
    if outcome.results is not None:
        print(f"\n{status_text(outcome.results, with_artifacts=False)}\n")
    print(f"nnunet-flare fetch {run} --kit {kit}")
    return 0


def fetch(kit: Path, run: str, out: Path) -> int:
    with _session(kit) as session:
        controller = fetch_results(session, run, out)
    print(f"{status_text(out)}\n")
    if (out / MODEL_FOLDER).is_dir():
        folds = " ".join(map(str, TrainingConfig.from_json(controller.training or {}).folds))
        print(f"nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {out / MODEL_FOLDER} -f {folds}")
    elif controller.encryption is not None:
        print("the models are at the sites, in their nnUNet_results: the server cannot read them")
    else:
        print("the server knows no whole model: each site has its own, in its nnUNet_results")
    return 0


def stop(kit: Path, run: str) -> int:
    with _session(kit) as session:
        stop_jobs(session, run, _say)
    return 0


def stop_jobs(console: Console, run: str, say: Callable[[str], None], clock: Clock = time) -> None:
    """Stop what runs of a run, and wait for its end.

    Raises:
        StateError: nothing runs, or a job does not end within a minute.
    """
    running = [job for job in console.jobs(run) if not job.has_ended]
    if not running:
        raise StateError(field=f"run {run}", expected="a running job", found="none", remedy="see nnunet-flare status")
    for job in running:
        console.abort(job.id)
        until = clock.monotonic() + _STOP_SECONDS
        while (now := console.job(job.id)) and not now.has_ended:
            if clock.monotonic() > until:
                raise StateError(
                    field=f"job {job.id}",
                    expected=f"its end within {_STOP_SECONDS:.0f} s",
                    found=now.status,
                    remedy="it was told to stop and does not end yet; look again with nnunet-flare status",
                )
            clock.sleep(1)
        say(f"stopped job {job.id}; submit {run} again to continue the run")


def _session(kit: Path) -> AdminSession:
    return AdminSession(StartupKit.read_user(kit))


def _say(text: str) -> None:
    print(text, flush=True)
