"""Checkpoints of a training, on a disk that is full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ON_A_FULL_DISK = """
import json, os, resource, sys
from pathlib import Path
from types import SimpleNamespace

import torch

from nnunet_flare.nnunet.stepper import TrainerStepper
from nnunet_flare.nnunet.worker import _answer

network = torch.nn.Linear(200, 200)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
stepper = object.__new__(TrainerStepper)
stepper.trainer = SimpleNamespace(
    network=network,
    was_initialized=True,
    optimizer=optimizer,
    grad_scaler=None,
    device=torch.device("cpu"),
    num_epochs=3,
    _best_ema=None,
    output_folder=sys.argv[1],
    output_folder_base=sys.argv[1],
    save_checkpoint=lambda file: torch.save(network.state_dict(), file),
    logger=SimpleNamespace(
        local_logger=SimpleNamespace(my_fantastic_logging={"ema_fg_dice": [0.5]}), load_checkpoint=lambda logs: None
    ),
)


class Commands:
    def save(self):
        stepper.save(Path(sys.argv[1], "round_00001.pt"))
        return {}

    def finish(self):
        stepper.finish()
        return {}

    def restore(self):
        torch.nn.init.zeros_(network.weight)
        stepper.restore(Path(sys.argv[1], "round_00001.pt"))
        return {"zeros": not network.weight.any().item()}


def answer(command):
    return _answer(Commands(), command, {}, {})[0]


before = answer("save"), answer("finish")
if sys.argv[2] == "limit":  # a write beyond the limit fails as one beyond the end of the disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
else:
    disk = os.statvfs(sys.argv[1])
    Path(sys.argv[1], "ballast").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 50_000))
print(json.dumps([before, answer("save"), answer("finish"), answer("restore")]))
"""


@pytest.fixture(params=[("limit", "File too large"), ("disk", "No space left on device")], ids=lambda param: param[0])
def full_folder(request, tmp_path: Path):
    """A folder, how it becomes full, and what the system then says."""
    kind, cause = request.param
    if kind == "disk":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True)
        if mounted.returncode:
            pytest.skip("a small disk can only be mounted by root")
    yield tmp_path, kind, cause
    if kind == "disk":
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_in_the_reply_and_leaves_the_previous_checkpoint(full_folder):
    folder, kind, cause = full_folder
    result = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, str(folder), kind], capture_output=True, text=True, check=True
    )
    before, *replies, restored = json.loads(result.stdout.splitlines()[-1])
    assert before == [{}, {}]
    for reply in replies:
        assert reply["error"]["code"] == "state"
        assert reply["error"]["found"] == cause
        assert "free disk space" in reply["error"]["remedy"]
        assert str(folder) not in json.dumps(reply)
    assert restored == {"zeros": False}
    assert set(os.listdir(folder)) - {"ballast"} == {"round_00001.pt", "checkpoint_final.pth"}
