"""FLARE's sessions: opened again when the server forgot them, their errors told in one line, always closed."""

from __future__ import annotations

import errno
import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.fuel.flare_api.api_spec import (
    AuthenticationError,
    AuthorizationError,
    JobNotFound,
    JobNotRunning,
    NoConnection,
    SessionClosed,
)

from nnunet_flare.console import session as module
from nnunet_flare.console.session import AdminSession
from nnunet_flare.errors import RefusedError, StateError, UnreachableError
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.provision.kit import USER, StartupKit

KIT = StartupKit(
    folder=Path("/kit"),
    kind=USER,
    name="lead@org",
    host="fl.example.org",
    ports=(8002,),
    server="fl.example.org",
    security="mtls",
)


class FakeSession:
    """Answers each command with the next of its answers; an exception is raised."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers, self.is_closed = answers, False

    def __getattr__(self, command: str) -> Any:
        def answer(*arguments: Any, **options: Any) -> Any:
            given = self.answers[command].pop(0)
            if isinstance(given, Exception):
                raise given
            return given

        return answer

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[FakeSession]:
    """The sessions that FLARE will open, in order."""
    given: list[FakeSession] = []
    waiting = iter(given)

    def open_session(*arguments: Any, **options: Any) -> FakeSession:
        opened = next(waiting, None)
        if opened is None:
            raise NoConnection("cannot connect to server")
        return opened

    monkeypatch.setattr(module, "new_secure_session", open_session)
    monkeypatch.setattr(module.ConfigService, "initialize", lambda **_: None)  # the kit has no folder
    return given


def test_one_session_serves_many_commands_and_is_closed(sessions):
    sessions.append(FakeSession(abort_job=["", ""]))
    with AdminSession(KIT) as session:
        session.abort("1")
        session.abort("2")
        assert not sessions[0].is_closed
    assert sessions[0].is_closed


def test_a_session_that_the_server_forgot_is_opened_again_and_the_old_one_closed(sessions):
    sessions.append(FakeSession(abort_job=["", SessionClosed("the session is closed on server")]))
    sessions.append(FakeSession(abort_job=[""]))
    with AdminSession(KIT) as session:
        session.abort("1")
        session.abort("2")
    assert sessions[0].is_closed
    assert sessions[1].answers["abort_job"] == []


def test_without_a_server_the_error_names_host_and_port_and_what_to_check(sessions):
    with pytest.raises(UnreachableError, match=r"FLARE server fl\.example\.org:8002: .* see that the server runs"):
        AdminSession(KIT).jobs("heart")


@pytest.mark.parametrize("reason", [AuthorizationError("not for you"), AuthenticationError("who are you?")])
def test_a_person_without_the_right_is_told_so(sessions, reason):
    sessions.append(FakeSession(abort_job=[reason]))
    with pytest.raises(RefusedError, match=r"abort_job: expected a right of lead@org, found (not for|who are) you"):
        AdminSession(KIT).abort("1")


@pytest.mark.parametrize(
    "reason",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("runtime error encountered: failed to unzip file 'x': [Errno 28] No space left on device"),
    ],
)
def test_a_full_disk_of_this_machine_is_no_silent_server(sessions, reason):
    sessions.append(FakeSession(abort_job=[reason]))
    found = getattr(reason, "strerror", "No space left on device")
    with pytest.raises(StateError, match=f"expected files of this machine that can be read and written, found {found}"):
        AdminSession(KIT).abort("1")


@pytest.mark.parametrize("reason", [ConnectionResetError(errno.ECONNRESET, "reset"), TimeoutError("timed out")])
def test_a_broken_line_is_a_server_to_ask_again(sessions, reason):
    sessions.append(FakeSession(abort_job=[reason]))
    with pytest.raises(UnreachableError):
        AdminSession(KIT).abort("1")


def test_a_job_that_the_server_does_not_know_is_none(sessions):
    sessions.append(FakeSession(get_job_meta=[JobNotFound("no such job")]))
    assert AdminSession(KIT).job("1") is None


META = {"name": "heart", "status": "FINISHED:COMPLETED"}


def test_jobs_are_those_of_exactly_this_name(sessions):
    listed = [{"job_id": str(i), "job_name": name, "status": "RUNNING"} for i, name in enumerate(["heart", "heart-2"])]
    sessions.append(FakeSession(list_jobs=[listed], get_job_meta=[META]))
    assert [job.id for job in AdminSession(KIT).jobs("heart")] == ["0"]


@pytest.mark.parametrize(
    ("status", "server_started", "expected"),
    [
        ("RUNNING", "2026-01-01T12:00:00+00:00", "RUNNING"),
        ("RUNNING", "2026-01-01T12:00:02+00:00", "LOST"),
        ("DISPATCHED", "2026-01-01T12:00:02+00:00", "LOST"),
        ("FINISHED:COMPLETED", "2026-01-01T12:00:02+00:00", "FINISHED:COMPLETED"),
    ],
)
def test_a_job_that_began_before_its_server_is_lost(sessions, status, server_started, expected):
    server = SimpleNamespace(start_time=datetime.fromisoformat(server_started).timestamp())
    meta = META | {"status": status, "start_time": "2026-01-01T12:00:01+00:00"}
    sessions.append(FakeSession(get_job_meta=[meta], get_system_info=[SimpleNamespace(server_info=server)]))
    assert AdminSession(KIT).job("1").status == expected


def test_the_progress_of_a_running_job_is_its_history(sessions):
    history = RunHistory(run_name="heart", run_id="1", num_rounds=3, started=0.0)
    told = {"sites": ["site-1"], "history": json.loads(json.dumps(history.to_json()))}
    sessions.append(FakeSession(show_stats=[{"server": {"nnunet_flare": told}}]))
    progress = AdminSession(KIT).progress("1")
    assert progress.history == history
    assert progress.sites == {"site-1"}


@pytest.mark.parametrize(
    "answer",
    [JobNotFound("Cannot find job"), JobNotRunning("no"), {}, {"server": None}, {"server": {"ServerRunner": {}}}],
)
def test_a_job_that_does_not_answer_yet_has_no_progress(sessions, answer):
    sessions.append(FakeSession(show_stats=[answer]))
    assert AdminSession(KIT).progress("1") is None


def test_a_site_that_was_not_heard_of_for_a_minute_is_not_connected(sessions):
    clients = [SimpleNamespace(name=f"site-{age}", last_connect_time=1000.0 - age) for age in (0, 30, 90)]
    sessions.append(FakeSession(get_system_info=[SimpleNamespace(client_info=clients)]))
    assert AdminSession(KIT).connected_sites() == {"site-0", "site-30"}


def test_idle_is_who_answers_and_runs_another_job_or_none(sessions):
    answers = [
        {"client_name": "site-1", "job_id": "1", "status": "started"},
        {"client_name": "site-2", "job_id": "2", "status": "started"},
        {"client_name": "site-3", "status": "no_jobs"},
        {"client_name": "site-4", "status": "no_reply"},
    ]
    sessions.append(FakeSession(get_client_job_status=[answers]))
    sites = frozenset(answer["client_name"] for answer in answers)
    assert AdminSession(KIT).idle_sites("1", sites) == {"site-2", "site-3"}


def test_a_job_is_sent_as_one_of_its_series_and_known_as_such(sessions, tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(META))
    sessions.append(FakeSession(submit_job=["1"]))
    session = AdminSession(KIT)
    assert session.submit(tmp_path, "one", "token") == "1"
    sent = json.loads((tmp_path / "meta.json").read_text())
    assert sent.items() > META.items()
    sessions[0].answers["get_job_meta"] = [sent, META, META | {"custom_props": 3}]
    assert [session.job("1").series for _ in range(3)] == ["one", "", ""]
