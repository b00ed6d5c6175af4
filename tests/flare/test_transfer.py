"""A site's reply is fetched up to the size of its network, and not beyond."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from nvflare.apis.signal import Signal

from conftest import tiny_job
from nnunet_flare.errors import UpdateError
from nnunet_flare.flare import transfer
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.flare.transfer import fetch_layers

if TYPE_CHECKING:
    from local_federation import LocalFederation

MEGABYTE = 1 << 20
SENDS_TOO_MUCH = """
import numpy as np
from nnunet_flare.flare import protocol

to_shareable = protocol.Message.to_shareable


def with_ballast(message):
    if message.layers:
        ballast = {f"ballast {number}": np.zeros(4 << 20, np.float32) for number in range(16)}
        message = protocol.Message(content=message.content, layers={**message.layers, **ballast})
    return to_shareable(message)


protocol.Message.to_shareable = with_ballast
"""


def test_a_transfer_is_broken_off_when_it_is_more_than_the_layers(monkeypatch: pytest.MonkeyPatch):
    chunks = []

    def send_request() -> SimpleNamespace:
        chunks.append(bytes(MEGABYTE))
        return SimpleNamespace(payload={"data": [chunks[-1][:1000], chunks[-1][1000:]]})

    def materialize(layers, cell, stop):
        while not stop.triggered:
            cell.send_request()
        raise RuntimeError("aborted")

    monkeypatch.setattr(transfer, "materialize_lazy_download_refs", materialize)
    cell = SimpleNamespace(send_request=send_request)
    with pytest.raises(UpdateError, match="hospital-c: layers: expected at most 5242880 bytes") as refusal:
        fetch_layers({}, cell=cell, site="hospital-c", max_bytes=5 * MEGABYTE, give_up=Signal())
    assert len(chunks) == 7  # the layers, a margin, and the one too many
    assert refusal.value.local_detail == ""


@pytest.mark.federation
def test_a_hospital_that_sends_more_than_its_layers_is_left_out_of_the_round(
    federation: LocalFederation, tmp_path: Path
):
    (tmp_path / "sitecustomize.py").write_text(SENDS_TOO_MUCH)
    federation.stop("hospital-c")
    federation.start("hospital-c", PYTHONPATH=str(tmp_path))
    try:
        meta = federation.run_job(tiny_job(tmp_path, "too_much", min_sites=2))
    finally:
        federation.stop("hospital-c")
        federation.start("hospital-c")
        with federation.session() as session:
            federation.wait_for_sites(session)
    assert meta["status"] == "FINISHED:COMPLETED"
    (record,) = RunHistory.load(federation.home / "server" / "runs" / "too_much").rounds
    assert set(record.sites) == {"hospital-a", "hospital-b"}
    assert "hospital-c: layers: expected at most" in record.missing["hospital-c"]
    assert "found more" in record.missing["hospital-c"]
