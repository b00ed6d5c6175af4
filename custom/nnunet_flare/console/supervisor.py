"""Follows a job, and submits it again when it ends before its run: the run goes on behind its last round.

submitted -> running -> complete                                          the run's results
                |-----> ended by an error that trying again cannot mend   given up
                |-----> ended or lost otherwise                           waits for the sites, submits again
                `-----> a late site is connected, a round has ended       stops the job, submits again with it
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from nnunet_flare.console.outcome import Outcome, can_be_mended
from nnunet_flare.console.session import Job, Progress
from nnunet_flare.console.submission import PreparedJob
from nnunet_flare.errors import NNUNetFlareError, ParticipationError, StateError, UnreachableError
from nnunet_flare.flare.history import ENDS, RunHistory, duration_text, in_site_order

__all__ = ["Clock", "Console", "Supervisor"]

_POLL_SECONDS = 2.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _LONGEST_SILENCE_SECONDS = 5.0, 300.0, 30.0
_ALL_SITES_SECONDS = 60.0
_CHECK_SECONDS = 10.0
T = TypeVar("T")


class Console(Protocol):
    """What a supervisor asks of the server."""

    def connected_sites(self) -> frozenset[str]: ...

    def jobs(self, run: str) -> list[Job]: ...

    def job(self, job_id: str) -> Job | None: ...

    def submit(self, job_folder: Path, series: str, token: str) -> str: ...

    def progress(self, job_id: str) -> Progress | None: ...

    def idle_sites(self, job_id: str, sites: frozenset[str]) -> frozenset[str]: ...

    def abort(self, job_id: str) -> None: ...


class Clock(Protocol):
    """Module ``time``, but in tests."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class Supervisor:
    """Sees a run to its end.

    Args:
        console: The server.
        outcome_of: What an ended job, or None for a lost one, left (``read_outcome``).
        say: Writes a line for the person who waits.
        retries: Submissions after a failure, without a round gained in between; 0 only follows.
        wait_s: How long to wait for the server, or for sites, to be connected again.
        clock: Tells the time, and waits.
    """

    def __init__(
        self,
        console: Console,
        outcome_of: Callable[[Job | None], Outcome],
        say: Callable[[str], None],
        *,
        retries: int = 0,
        wait_s: float = 1800.0,
        clock: Clock = time,
    ) -> None:
        self._console, self._outcome_of, self._say, self._clock = console, outcome_of, say, clock
        self._retries, self._wait_s = retries, wait_s
        self._series = uuid.uuid4().hex
        self._sites: frozenset[str] = frozenset()
        self._shown_phase = ""
        self._shown_rounds: dict[str, int] = {}

    def submit(self, job: PreparedJob) -> str:
        """Send the job, unless another one of its run is under way; returns FLARE's id.

        Raises:
            StateError: one is.
        """
        earlier = self._console.jobs(job.run)
        for other in earlier:
            if not other.has_ended:
                raise StateError(
                    field=f"run {job.run}",
                    expected="no other job of this name",
                    found=f"job {other.id}, {other.status}, submitted {other.submitted}",
                    remedy="follow it with nnunet-flare status --follow or stop it, or give this run another name",
                )
        if earlier and not earlier[0].is_complete:
            self._series = earlier[0].series or self._series
        return self._announced(job, self._console.submit(job.folder, self._series, uuid.uuid4().hex))

    def _submit_again(self, job: PreparedJob) -> str:
        token = uuid.uuid4().hex
        return self._announced(job, self._patiently(lambda: self._console.submit(job.folder, self._series, token)))

    def _announced(self, job: PreparedJob, job_id: str) -> str:
        self._say(f"submitted {job.run} as job {job_id}")
        return job_id

    def see_through(self, job: PreparedJob, job_id: str) -> Outcome:
        """Follow the submitted job, and those that replace it, to the end of the run.

        Raises:
            NNUNetFlareError: what ended the last one.
        """
        tries, pauses = self._retries, _pauses()
        while True:
            rounds = self._num_shown()
            stopped_for = self._follow(job_id)
            outcome = self._outcome(job_id)
            if outcome.error is None:
                return outcome
            error = stopped_for or outcome.error
            if self._num_shown() > rounds:
                tries, pauses = self._retries, _pauses()
            if not (tries and can_be_mended(error)):
                raise error
            pause = next(pauses)
            self._say(str(error))
            self._say(f"submitting again in {duration_text(pause)} ({tries} of {self._retries} tries left)")
            tries -= 1
            self._clock.sleep(pause)
            self._await_sites(job.min_sites)
            job_id = self._submit_again(job)

    def follow(self, job_id: str) -> Outcome:
        """Follow one job to its end."""
        self._follow(job_id)
        return self._outcome(job_id)

    def _outcome(self, job_id: str) -> Outcome:
        outcome = self._patiently(lambda: self._outcome_of(self._console.job(job_id)))
        if outcome.history is not None:
            self._show(outcome.history)
        return outcome

    def _follow(self, job_id: str) -> NNUNetFlareError | None:
        """Show a job's progress until it ends; where this stopped the job itself, the reason."""
        there_before = self._patiently(self._console.connected_sites)
        told: set[str] = set()
        idle: frozenset[str] = frozenset()
        stopped_for: NNUNetFlareError | None = None
        next_check = self._clock.monotonic() + _CHECK_SECONDS
        while True:
            job = self._patiently(lambda: self._console.job(job_id))
            if job is None or job.has_ended:
                return stopped_for
            for refusal in set(job.refusals()) - told:
                self._say(f"not taking part: {refusal}")
                told.add(refusal)
            progress = self._patiently(lambda: self._console.progress(job_id))
            if progress is not None:
                self._sites = progress.sites
                a_round_ended = self._show(progress.history)
                is_due = a_round_ended or self._clock.monotonic() >= next_check
                if is_due and self._retries and stopped_for is None and progress.history.phase not in ENDS:
                    connected = self._patiently(self._console.connected_sites)
                    there_before &= connected - job.unanswered()
                    if a_round_ended and progress.history.phase == "train":
                        stopped_for = _late(connected - progress.sites - there_before)
                    else:
                        ask = partial(self._console.idle_sites, job_id, progress.sites & connected)
                        before, idle = idle, self._patiently(ask)
                        stopped_for = _restarted(idle & before)
                        next_check = self._clock.monotonic() + _CHECK_SECONDS
                    if stopped_for is not None:
                        self._patiently(lambda: self._console.abort(job_id))
            self._clock.sleep(_POLL_SECONDS)

    def _show(self, history: RunHistory) -> bool:
        """Say what is new; True if a round is."""
        shown = self._shown_rounds.get(history.run_name)
        if shown is None:  # of rounds before this command, the last one is enough
            shown = history.rounds_done - 1
        new = [record for record in history.rounds if record.round > shown]
        for record in new:
            self._say(history.progress_line(record))
            for site in in_site_order(record.missing):
                self._say(f"  {record.missing[site]}")
        self._shown_rounds[history.run_name] = max(shown, history.rounds_done)
        phase = f"{history.run_name}: {history.phase}"
        if phase != self._shown_phase and history.phase != "failed":
            self._say(phase)
            self._shown_phase = phase
        return bool(new)

    def _num_shown(self) -> int:
        return sum(self._shown_rounds.values())

    def _await_sites(self, min_sites: int | None) -> None:
        """Wait until all sites of the run are connected, or after a minute as many as the job needs, or no longer."""
        started, told = self._clock.monotonic(), False
        while absent := self._sites - (connected := self._patiently(self._console.connected_sites)):
            waited = self._clock.monotonic() - started
            enough = min_sites is not None and len(self._sites & connected) >= min_sites
            if waited > (_ALL_SITES_SECONDS if enough else self._wait_s):
                return
            if not told:
                self._say(f"waiting for {_names(absent)}")
                told = True
            self._clock.sleep(_POLL_SECONDS)

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask again while the server does not answer, as after its restart or on a broken line."""
        started, pauses, told = self._clock.monotonic(), _pauses(_LONGEST_SILENCE_SECONDS), False
        while True:
            try:
                return ask()
            except UnreachableError as error:
                if self._clock.monotonic() - started > self._wait_s:
                    raise
                if not told:
                    self._say(f"{error}; asking again for {duration_text(self._wait_s)}")
                    told = True
                self._clock.sleep(next(pauses))


def _pauses(longest: float = _LONGEST_PAUSE_SECONDS) -> Iterator[float]:
    pause = _FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, longest)


def _late(sites: frozenset[str]) -> ParticipationError | None:
    return _absence(sites, "every site that is connected", "one that came later", "it joins at the next submission")


def _restarted(sites: frozenset[str]) -> ParticipationError | None:
    found = "none, though the site is connected"
    return _absence(sites, "its process at the site", found, "it takes part again at the next submission")


def _absence(sites: frozenset[str], expected: str, found: str, remedy: str) -> ParticipationError | None:
    if not sites:
        return None
    return ParticipationError(field="job", expected=expected, found=found, remedy=remedy, site=_names(sites))


def _names(sites: frozenset[str]) -> str:
    return ", ".join(in_site_order(sites))
