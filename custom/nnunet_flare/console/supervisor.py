"""Follows a job, and submits it again when it ends before its run: the run goes on behind its last round.

    submitted -> running -> complete                                          the run's results
                    |-----> ended by an error that trying again cannot mend   given up
                    |-----> ended or lost otherwise                           waited for the sites, submitted again
                    `-----> a late site is connected, a round has just ended  stopped, submitted again with it
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from nnunet_flare.console.outcome import Outcome
from nnunet_flare.console.session import Job, Progress
from nnunet_flare.console.submission import PreparedJob
from nnunet_flare.errors import NNUNetFlareError, StateError, UnreachableError
from nnunet_flare.flare.history import RunHistory, in_site_order

__all__ = ["Console", "Follower", "Supervisor"]

_POLL_SECONDS = 2.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
_ALL_SITES_SECONDS = 60.0


class Console(Protocol):
    """What a supervisor needs of ``AdminSession``."""

    def connected_sites(self) -> frozenset[str]: ...

    def jobs(self, run: str) -> list[Job]: ...

    def job(self, job_id: str) -> Job | None: ...

    def submit(self, job_folder: Path, token: str) -> str: ...

    def progress(self, job_id: str) -> Progress | None: ...

    def abort(self, job_id: str) -> None: ...

    def outcome(self, job: Job | None) -> Outcome: ...
