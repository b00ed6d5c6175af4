"""When a run is submitted again, when it is given up, and when a late site is let in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from nnunet_flare.console.outcome import Outcome, judge
from nnunet_flare.console.session import Job, Progress
from nnunet_flare.console.submission import PreparedJob
from nnunet_flare.console.supervisor import Supervisor
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
    UnreachableError,
    WorkerError,
)
from nnunet_flare.flare.history import RoundRecord, RunHistory, SiteRound

SITES = frozenset({"site-1", "site-2"})
LOST, STOPPED, COMPLETE = "FINISHED:EXECUTION_EXCEPTION", "FINISHED:ABORTED", "FINISHED:COMPLETED"


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look at the server shows; ``status`` None: it does not know the job; ``silent``: it does not answer."""

    status: str | None = "RUNNING"
    rounds: int | None = None
    connected: frozenset[str] = SITES
    missing: str = ""
    silent: bool = False
    idle: frozenset[str] = frozenset()
    deployment: tuple[str, ...] = ()


class FakeServer:
    """Jobs that go through the looks given, one at each question for the job; the clock moves only by sleeping."""

    def __init__(self, *jobs: list[Look], errors: dict[str, NNUNetFlareError] | None = None, others: list[Job] = ()):
        self.scripts, self.errors, self.others = jobs, errors or {}, list(others)
        self.tokens: list[str] = []
        self.series: list[str] = []
        self.aborted: list[str] = []
        self.slept: list[float] = []
        self.looks: list[Look] = []
        self.look, self.now = Look(), 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)

    def jobs(self, run: str) -> list[Job]:
        return self.others

    def submit(self, job_folder: Path, series: str, token: str) -> str:
        self.looks = list(self.scripts[len(self.tokens)])
        self.look = self.looks[0]
        self.tokens.append(token)
        self.series.append(series)
        return f"job-{len(self.tokens)}"

    def job(self, job_id: str) -> Job | None:
        if self.looks:
            self.look = self.looks.pop(0)
        if self.look.silent:
            raise UnreachableError(field="server", expected="an answer", found="none", remedy="wait")
        if self.look.status is None:
            return None
        return Job(id=job_id, run="heart", status=self.look.status, deployment=self.look.deployment)

    def progress(self, job_id: str) -> Progress | None:
        return None if self.look.rounds is None else Progress(sites=SITES, history=history(self.look))

    def connected_sites(self) -> frozenset[str]:
        return self.look.connected

    def idle_sites(self, job_id: str, sites: frozenset[str]) -> frozenset[str]:
        return self.look.idle & sites

    def abort(self, job_id: str) -> None:
        self.aborted.append(job_id)
        self.looks = [Look(status=STOPPED, connected=self.look.connected)]

    def outcome(self, job: Job | None) -> Outcome:
        return Outcome(error=judge(job, self.errors.get(job.id) if job else None))


def history(look: Look) -> RunHistory:
    site = SiteRound(
        dice={"a": 0.5}, train_loss=0.4, num_cases=4, upload_bytes=1, download_bytes=1, seconds=1.0, role="train"
    )
    missing = {look.missing: f"{look.missing}: reply: expected one, found none; restart it"} if look.missing else {}
    records = tuple(
        RoundRecord(round=number, sites={"site-1": site}, missing=missing, seconds=1.0)
        for number in range(1, look.rounds + 1)
    )
    return RunHistory(run_name="heart", run_id="1", num_rounds=9, started=0.0, phase="train", rounds=records)


def error(kind: type[NNUNetFlareError]) -> NNUNetFlareError:
    return kind(field="thing", expected="one", found="another", remedy="mend it", site="site-2")


def see_through(server: FakeServer, *, retries: int = 0, min_sites: int | None = None, wait_s: float = 600.0):
    said: list[str] = []
    supervisor = Supervisor(server, server.outcome, said.append, retries=retries, wait_s=wait_s, clock=server)
    job = PreparedJob(run="heart", folder=Path("heart"), min_sites=min_sites)
    supervisor.see_through(job, supervisor.submit(job))
    return said


def test_a_run_is_shown_phase_by_phase_and_round_by_round_each_once():
    looks = [Look(), Look(rounds=0), Look(rounds=1), Look(rounds=1), Look(rounds=3, missing="site-2")]
    said = see_through(FakeServer([*looks, Look(status=COMPLETE)]))
    assert said[0] == "submitted heart as job job-1"
    assert said[1] == "heart: train"
    assert [line.split("  ")[0] for line in said[2:] if line.startswith("round")] == [
        "round 1 of 9",
        "round 2 of 9",
        "round 3 of 9",
    ]
    assert said[-1] == "  site-2: reply: expected one, found none; restart it"


@pytest.mark.parametrize(
    "end", [LOST, "FINISHED:ABNORMAL", "FINISHED:ABANDONED", "FINISHED:CAN_NOT_SCHEDULE", "LOST", None]
)
def test_a_job_that_was_lost_is_submitted_again(end: str | None):
    server = FakeServer([Look(rounds=1), Look(status=end)], [Look(rounds=2), Look(status=COMPLETE)])
    see_through(server, retries=1)
    assert len(set(server.tokens)) == 2


@pytest.mark.parametrize("kind", [ParticipationError, WorkerError, StateError])
def test_what_may_pass_by_itself_is_tried_again(kind):
    server = FakeServer([Look(status=LOST)], [Look(status=COMPLETE)], errors={"job-1": error(kind)})
    see_through(server, retries=1)
    assert len(server.tokens) == 2


@pytest.mark.parametrize(
    "kind",
    [
        ConfigError,
        DatasetError,
        DecryptionError,
        EncryptionError,
        LayerMismatchError,
        NNUNetFlareError,
        PlansError,
        PolicyError,
    ],
)
def test_what_somebody_must_correct_first_is_not_tried_again(kind):
    server = FakeServer([Look(status=LOST)], errors={"job-1": error(kind)})
    with pytest.raises(kind, match="site-2: thing: expected one, found another; mend it"):
        see_through(server, retries=5)
    assert len(server.tokens) == 1


def test_a_job_that_a_person_stopped_stays_stopped():
    server = FakeServer([Look(rounds=1), Look(status=STOPPED)])
    with pytest.raises(RefusedError, match="stopped by a person"):
        see_through(server, retries=5)


def test_a_deployment_that_sites_refuse_is_not_tried_again_and_names_them():
    refused = ("server: OK", "site-1: not authorized", "site-2: OK")
    server = FakeServer([Look(status="FINISHED:FAILED_TO_RUN", deployment=refused)])
    with pytest.raises(RefusedError, match="found site-1: not authorized; see the logs"):
        see_through(server, retries=5)


def test_a_deployment_that_sites_did_not_answer_is_tried_again():
    silent = ("server: OK", "site-1: no reply (deployment timeout)")
    looks = [Look(status="FINISHED:FAILED_TO_RUN", deployment=silent)]
    see_through(FakeServer(looks, [Look(status=COMPLETE)]), retries=1)


def test_a_site_that_does_not_take_the_job_is_named_once():
    look = Look(deployment=("server: OK", "site-2: class not allowed"))
    said = see_through(FakeServer([look, look, Look(status=COMPLETE)]))
    assert said.count("not taking part: site-2: class not allowed") == 1


def test_without_retries_the_first_failure_is_the_last():
    server = FakeServer([Look(rounds=1), Look(status=LOST)])
    with pytest.raises(WorkerError, match="a process of the job was lost"):
        see_through(server)


def test_tries_without_progress_are_counted_with_growing_pauses_and_then_it_is_given_up():
    server = FakeServer(*[[Look(rounds=1), Look(status=LOST)]] * 4)
    with pytest.raises(WorkerError):
        see_through(server, retries=3)
    assert len(server.tokens) == 4
    assert [seconds for seconds in server.slept if seconds != 2.0] == [5.0, 10.0, 20.0]


def test_pauses_are_bounded():
    server = FakeServer(*[[Look(status=LOST)]] * 13)
    with pytest.raises(WorkerError):
        see_through(server, retries=12)
    assert max(server.slept) == 300.0


def test_a_round_gained_resets_the_count_and_the_pauses():
    lost = [[Look(rounds=number), Look(status=LOST)] for number in (1, 1, 2, 2, 3)]
    server = FakeServer(*lost, [Look(status=COMPLETE)])
    see_through(server, retries=2)
    assert [seconds for seconds in server.slept if seconds != 2.0] == [5.0, 10.0, 5.0, 10.0, 5.0]


def test_a_late_site_is_let_in_after_a_round():
    late = SITES | {"site-3"}
    looks = [Look(rounds=0), Look(rounds=1), Look(rounds=1, connected=late), Look(rounds=2, connected=late)]
    server = FakeServer(looks, [Look(rounds=3, connected=late), Look(status=COMPLETE)])
    said = see_through(server, retries=1)
    assert server.aborted == ["job-1"]
    assert server.now < 30
    reason = "site-3: job: expected every site that is connected, found one that came later; it joins at the next"
    assert [line.split("  ")[0] for line in said if line.startswith(("round", "site"))] == [
        "round 1 of 9",
        "round 2 of 9",
        f"{reason} submission",
        "round 3 of 9",
    ]


@pytest.mark.parametrize("retries", [0, 1])
def test_a_site_that_was_restarted_is_taken_in_again_at_once(retries: int):
    restarted = [Look(rounds=1, idle=frozenset({"site-2"}))] * 15
    server = FakeServer([*restarted, Look(status=COMPLETE)], [Look(status=COMPLETE)])
    said = see_through(server, retries=retries)
    assert server.aborted == ["job-1"] * retries
    assert any(line.startswith("site-2: job: expected its process at the site, found none") for line in said) == retries


def test_a_site_that_ends_its_part_a_little_before_the_server_is_no_restarted_one():
    idle = Look(rounds=1, idle=frozenset({"site-2"}))
    server = FakeServer([*[Look(rounds=1)] * 5, idle, *[Look(rounds=1)] * 5, idle, Look(status=COMPLETE)])
    see_through(server, retries=1)
    assert server.aborted == []


def test_a_site_that_is_restarted_again_and_again_is_given_up():
    restarted = [Look(rounds=1, idle=frozenset({"site-2"}))] * 15
    server = FakeServer(*[restarted] * 3)
    with pytest.raises(ParticipationError, match="site-2: job: expected its process"):
        see_through(server, retries=2)


def test_a_late_site_waits_while_no_round_ends():
    late = SITES | {"site-3"}
    looks = [Look(rounds=1), Look(rounds=1, connected=late), Look(rounds=1, connected=late), Look(status=COMPLETE)]
    server = FakeServer(looks)
    see_through(server, retries=1)
    assert server.aborted == []


def test_without_retries_a_job_is_never_stopped():
    late = SITES | {"site-3"}
    server = FakeServer([Look(rounds=1), Look(rounds=2, connected=late), Look(status=COMPLETE)])
    see_through(server)
    assert server.aborted == []


def test_a_site_that_was_there_and_did_not_take_the_job_is_no_late_one():
    late = SITES | {"site-3"}
    looks = [Look(rounds=number, connected=late) for number in (0, 1, 2)]
    server = FakeServer([*looks, Look(status=COMPLETE)])
    see_through(server, retries=1)
    assert server.aborted == []


@pytest.mark.parametrize("is_listed_all_the_time", [True, False])
def test_a_site_that_was_down_when_the_job_began_is_let_in_when_it_is_back(is_listed_all_the_time: bool):
    late = SITES | {"site-3"}
    down = ("server: OK", "site-1: OK", "site-2: OK", "site-3: no reply (deployment timeout)")
    deployment = down if is_listed_all_the_time else ()
    gone = late if is_listed_all_the_time else SITES
    looks = [Look(rounds=1, connected=late, deployment=deployment)]
    looks += [Look(rounds=1, connected=gone, deployment=deployment)] * 10
    looks += [Look(rounds=2, connected=late, deployment=deployment), Look(status=COMPLETE)]
    server = FakeServer(looks, [Look(status=COMPLETE)])
    see_through(server, retries=1)
    assert server.aborted == ["job-1"]


def test_before_it_is_submitted_again_the_sites_must_be_connected():
    gone = frozenset({"site-1"})
    server = FakeServer([Look(rounds=1), Look(status=LOST, connected=gone)], [Look(status=COMPLETE)])
    said = see_through(server, retries=1, wait_s=100.0)
    assert "waiting for site-2" in said
    assert 100.0 < server.now < 120.0


def test_with_as_many_sites_as_the_job_needs_a_minute_is_enough():
    gone = frozenset({"site-1"})
    server = FakeServer([Look(rounds=1), Look(status=LOST, connected=gone)], [Look(status=COMPLETE)])
    see_through(server, retries=1, min_sites=1)
    assert 60.0 < server.now < 80.0


def test_a_server_that_does_not_answer_for_a_while_is_asked_again():
    silent = [Look(silent=True)] * 4
    said = see_through(FakeServer([Look(rounds=1), *silent, Look(rounds=2), Look(status=COMPLETE)]))
    assert sum("asking again for 10 min" in line for line in said) == 1
    assert any(line.startswith("round 2") for line in said)


def test_a_server_that_does_not_come_back_is_given_up():
    server = FakeServer([Look(rounds=1), *[Look(silent=True)] * 100])
    with pytest.raises(UnreachableError):
        see_through(server, retries=3, wait_s=120.0)
    assert 120.0 < server.now < 180.0


def test_all_submissions_until_a_complete_one_are_of_one_series():
    lost = Job(id="old", run="heart", status=LOST, series="one")
    server = FakeServer([Look(status=LOST)], [Look(status=COMPLETE)], others=[lost])
    see_through(server, retries=1)
    assert server.series == ["one", "one"]


def test_after_a_complete_job_a_new_series_begins():
    complete, lost = (Job(id="old", run="heart", status=status, series="one") for status in (COMPLETE, LOST))
    server = FakeServer([Look(status=LOST)], [Look(status=COMPLETE)], others=[complete, lost])
    see_through(server, retries=1)
    assert server.series[0] not in ("", "one")
    assert len(set(server.series)) == 1


def test_a_run_that_is_under_way_is_refused_with_its_job():
    other = Job(id="job-0", run="heart", status="RUNNING", submitted="2026-01-01")
    server = FakeServer([], others=[Job(id="old", run="heart", status=COMPLETE), other])
    with pytest.raises(StateError, match="run heart: expected no other job of this name, found job job-0, RUNNING"):
        see_through(server, retries=3)
    assert server.tokens == []
