"""What the commands say, and when they fail."""

from __future__ import annotations

import pytest

from nnunet_flare.console.commands import stop_jobs
from nnunet_flare.console.session import Job
from nnunet_flare.errors import StateError


class StoppingServer:
    """A server whose one job ends some seconds after it was told to; the clock moves only by sleeping."""

    def __init__(self, seconds: float, status: str = "RUNNING") -> None:
        self.seconds, self.status = seconds, status
        self.now, self.ends = 0.0, float("inf")

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def jobs(self, run: str) -> list[Job]:
        return [self.job("1"), Job(id="0", run=run, status="FINISHED:COMPLETED")]

    def job(self, job_id: str) -> Job:
        return Job(id=job_id, run="heart", status="FINISHED:ABORTED" if self.now >= self.ends else self.status)

    def abort(self, job_id: str) -> None:
        assert job_id == "1"
        self.ends = self.now + self.seconds


def test_a_job_counts_as_stopped_when_it_has_ended():
    server, said = StoppingServer(seconds=5), []
    stop_jobs(server, "heart", said.append, server)
    assert said == ["stopped job 1; submit heart again to continue the run"]
    assert server.now == 5


def test_a_job_that_does_not_end_is_not_called_stopped():
    server, said = StoppingServer(seconds=1000), []
    with pytest.raises(StateError, match=r"job 1: expected its end within 60 s, found RUNNING; .* does not end yet"):
        stop_jobs(server, "heart", said.append, server)
    assert said == []
    assert server.now < 70


def test_where_nothing_runs_there_is_nothing_to_stop():
    with pytest.raises(StateError, match="run heart: expected a running job, found none"):
        stop_jobs(StoppingServer(seconds=1, status="LOST"), "heart", print)
