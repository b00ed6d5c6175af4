"""Asking the sites: whose reply counts, what a broken transfer costs, and who fetches how many at once."""

from __future__ import annotations

import collections
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, TaskCompletionStatus
from nvflare.apis.signal import Signal

from nnunet_flare.errors import ParticipationError, UpdateError
from nnunet_flare.flare import transfer
from nnunet_flare.flare.conductor import Conductor, RunStoppedError
from nnunet_flare.flare.config import FederationConfig
from nnunet_flare.flare.protocol import Message, error_message

ROOM = collections.defaultdict(int)
SITES = tuple(f"site-{number}" for number in range(1, 8))


class Flare:
    """FLARE's part: every site sends its layers back at once; the server's cell."""

    def __init__(self) -> None:
        self.cell = SimpleNamespace(decode_pass_through_topics=set())
        server = SimpleNamespace(command_agent=SimpleNamespace(cell=self.cell))
        self.context = SimpleNamespace(get_engine=lambda: SimpleNamespace(server=server))
        self.abort_signal = Signal()
        self.silent: set[str] = set()
        self.said: list[str] = []

    def send(self, task, fl_ctx, targets):
        (site,) = targets
        if site in self.silent:
            task.completion_status = TaskCompletionStatus.TIMEOUT
            return
        client_task = ClientTask(Client(site, ""), task)
        client_task.result = task.data
        task.result_received_cb(client_task=client_task, fl_ctx=fl_ctx)
        task.completion_status = TaskCompletionStatus.OK

    def conductor(self, **settings: int) -> Conductor:
        return Conductor(self, FederationConfig(**settings), self.context, self.abort_signal, self.said.append)


@pytest.fixture
def flare() -> Flare:
    return Flare()


def requests(sites=SITES):
    return {site: ("train", Message(content={}, layers={"w": np.float32([1.0])})) for site in sites}


def test_replies_come_without_layers_which_are_fetched_for_four_sites_at_once(flare: Flare, monkeypatch):
    fetching, most, lock = [0], [0], threading.Lock()

    def fetch(layers, cell, give_up):
        assert cell.decode_pass_through_topics is flare.cell.decode_pass_through_topics
        with lock:
            fetching[0] += 1
            most[0] = max(most[0], fetching[0])
        time.sleep(0.05)
        with lock:
            fetching[0] -= 1
        return layers

    monkeypatch.setattr(transfer, "materialize_lazy_download_refs", fetch)
    accepted = {}
    outcome = flare.conductor().ask(requests(), accepted.__setitem__, layer_bytes=ROOM)
    assert set(accepted) == set(SITES)
    assert outcome.failures == {}
    assert most[0] == 4
    assert len(flare.cell.decode_pass_through_topics) == 1


def test_a_broken_transfer_is_the_sites_failure_and_no_one_elses(flare: Flare, monkeypatch):
    def fetch(layers, cell, give_up):
        if layers["w"][0] == 3:
            raise RuntimeError("download failed: /data/patient_07")
        return layers

    monkeypatch.setattr(transfer, "materialize_lazy_download_refs", fetch)
    asked = requests() | {"site-3": ("train", Message(content={}, layers={"w": np.float32([3.0])}))}
    accepted = {}
    outcome = flare.conductor().ask(asked, accepted.__setitem__, layer_bytes=ROOM)
    assert set(accepted) == set(SITES) - {"site-3"}
    error = outcome.failures["site-3"]
    assert isinstance(error, ParticipationError)
    assert "site-3: layers: expected the layers that the site announced, found a broken transfer" in str(error)
    assert "patient_07" not in str(error)


def test_what_accept_refuses_is_the_sites_failure(flare: Flare):
    def accept(site, message):
        if site == "site-2":
            raise UpdateError(field="layer w", expected="1", found="2", remedy="look")

    outcome = flare.conductor().ask(requests(SITES[:3]), accept, layer_bytes=ROOM)
    assert str(outcome.failures["site-2"]).startswith("site-2: layer w")
    assert set(outcome.seconds) == {"site-1", "site-3"}


def test_a_fault_of_our_own_is_raised_and_not_blamed_on_a_site(flare: Flare):
    with pytest.raises(ZeroDivisionError):
        flare.conductor().ask(requests(SITES[:2]), lambda site, message: 1 / 0, layer_bytes=ROOM)


def test_a_stopped_job_ends_the_wait(flare: Flare, monkeypatch):
    def fetch(layers, cell, give_up):
        flare.abort_signal.trigger(True)
        while not give_up.triggered:
            time.sleep(0.01)
        raise RuntimeError("aborted")

    monkeypatch.setattr(transfer, "materialize_lazy_download_refs", fetch)
    with pytest.raises(RunStoppedError):
        flare.conductor().ask(requests(), lambda site, message: None, layer_bytes=ROOM)


def test_the_deadline_ends_a_transfer_that_does_not(flare: Flare, monkeypatch):
    def fetch(layers, cell, give_up):
        while not give_up.triggered:
            time.sleep(0.01)
        raise RuntimeError("aborted")

    monkeypatch.setattr(transfer, "materialize_lazy_download_refs", fetch)
    asking = flare.conductor(round_timeout_s=1)
    outcome = asking.ask(requests(SITES[:2]), lambda *reply: None, within_round=True, layer_bytes=ROOM)
    assert set(outcome.failures) == {"site-1", "site-2"}
    assert "the deadline before all were fetched" in str(outcome.failures["site-1"])


def test_layers_that_nobody_asked_for_are_refused_before_they_are_fetched(flare: Flare, monkeypatch):
    monkeypatch.setattr(transfer, "materialize_lazy_download_refs", lambda *arguments: pytest.fail("fetched"))
    outcome = flare.conductor().ask(requests(SITES[:2]), lambda *reply: None)
    assert "found layers that nobody asked for" in str(outcome.failures["site-2"])


def test_a_silent_site_is_named_with_the_deadline(flare: Flare):
    flare.silent = {"site-2"}
    outcome = flare.conductor(round_timeout_s=7).ask(requests(SITES[:2]), lambda *reply: None, within_round=True)
    assert "site-2: train: expected a reply within 7 s" in str(outcome.failures["site-2"])


def test_what_every_site_must_deliver_fails_with_the_first_sites_error_and_tells_all(flare: Flare):
    error = UpdateError(field="fold", expected="0", found="1", remedy="mend")
    asked = {site: ("plan", Message(content={})) for site in SITES}
    asked |= {site: ("plan", error_message(error)) for site in ("site-5", "site-2")}
    with pytest.raises(UpdateError, match="site-2: fold"):
        flare.conductor().ask_every(asked)
    assert [line.split(": ")[1] for line in flare.said] == ["site-2", "site-5"]


def test_too_few_answers_name_the_least_number_and_the_reasons(flare: Flare):
    asking = flare.conductor(min_sites=3)
    asking.require(3, "updates", {})
    failure = UpdateError(field="layer w", expected="1", found="2", remedy="look", site="site-2")
    with pytest.raises(ParticipationError, match=r"at least 3, found 2 \(site-2: layer w.*lower min_sites"):
        asking.require(2, "updates", {"site-2": failure})
