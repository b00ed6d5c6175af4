"""The nnU-Net process and its worker, with nnU-Net's commands replaced by ones that go wrong in known ways."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.errors import DatasetError, NNUNetFlareError, StateError, WorkerError
from nnunet_flare.nnunet.pipe import receive, send
from nnunet_flare.nnunet.process import NNUNetProcess

COMMANDS = '''
"""Stands in for nnU-Net's commands in every interpreter that finds this file."""
import errno, os, subprocess, sys, time, types
from pathlib import Path


class Commands:
    def __init__(self, progress):
        self.progress = progress

    def pid(self):
        return {"pid": os.getpid()}

    def echo(self, layers):
        self.progress("echo", 1, 2)
        return {"names": list(layers)}, layers

    def refuse(self):
        from nnunet_flare.errors import DatasetError
        raise DatasetError(
            field="labelsTr", expected="a label", found="none", remedy="add it", local_detail="patient_07"
        )

    def stumble(self):
        raise ValueError("/data/patient_07.nii.gz is broken")

    def fill_disk(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/patient_07.nii.gz")

    def hang(self, file):
        workers = [subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]) for _ in range(2)]
        draft = Path(file + ".draft")
        draft.write_text(" ".join(map(str, [os.getpid(), *(worker.pid for worker in workers)])))
        draft.rename(file)
        time.sleep(600)

    def leave(self):
        os._exit(3)


module = types.ModuleType("nnunet_flare.nnunet.commands")
module.Commands = Commands
sys.modules[module.__name__] = module
'''


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "sitecustomize.py").write_text(COMMANDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_in"))
    process = NNUNetProcess(log_file=tmp_path / "nnunet.log", num_threads=1)
    yield process
    process.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_pids(file: Path) -> list[int]:
    give_up = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return [int(pid) for pid in file.read_text().split()]


def assert_ended(pids: list[int], seconds: float = 10) -> None:
    give_up = time.monotonic() + seconds
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < give_up, f"{alive} of {pids} are still there after {seconds} s"
        time.sleep(0.05)


def test_an_error_of_the_child_arrives_field_by_field_without_its_local_detail(process, tmp_path):
    with pytest.raises(DatasetError) as refusal:
        process.call("refuse", {})
    error = refusal.value
    assert (error.field, error.expected, error.found, error.remedy) == ("labelsTr", "a label", "none", "add it")
    assert error.local_detail == ""
    assert "patient_07" in (tmp_path / "nnunet.log").read_text()


def test_a_foreign_exception_arrives_by_its_type_only(process, tmp_path):
    with pytest.raises(WorkerError) as refusal:
        process.call("stumble", {})
    assert refusal.value.found == "ValueError"
    assert "patient_07" not in str(refusal.value.to_reply())
    assert "/data" not in str(refusal.value.to_reply())
    assert "patient_07" in (tmp_path / "nnunet.log").read_text()


def test_a_full_disk_arrives_by_its_cause_and_without_the_file(process):
    with pytest.raises(StateError) as refusal:
        process.call("fill_disk", {})
    assert refusal.value.found == "No space left on device"
    assert "free disk space" in refusal.value.remedy
    assert "patient_07" not in str(refusal.value.to_reply())


@pytest.mark.parametrize("command", ["unknown", "__init__", "progress", "_private"])
def test_a_command_that_does_not_exist_is_an_error(process, command):
    with pytest.raises(WorkerError):
        process.call(command, {})


def test_wrong_arguments_are_an_error(process):
    with pytest.raises(WorkerError, match="TypeError"):
        process.call("pid", {"colour": "blue"})


def test_after_an_error_the_next_call_has_a_fresh_child(process):
    first, _ = process.call("pid", {})
    assert process.call("pid", {})[0] == first
    with pytest.raises(NNUNetFlareError):
        process.call("stumble", {})
    assert_ended([first["pid"]])
    assert process.call("pid", {})[0] != first


def test_a_child_that_is_killed_is_named_with_its_signal_and_replaced(process, tmp_path):
    pids = []

    def kill() -> None:
        pids.extend(wait_for_pids(tmp_path / "pids"))
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(WorkerError, match=r"hang.*signal 9"):
        process.call("hang", {"file": str(tmp_path / "pids")})
    killer.join()
    assert_ended(pids)  # its own children, which hold the pipe, too
    assert process.call("pid", {})[0]["pid"] not in pids


def test_a_child_that_dies_between_two_calls_is_replaced(process):
    first, _ = process.call("pid", {})
    os.kill(first["pid"], signal.SIGKILL)
    os.waitid(os.P_PID, first["pid"], os.WEXITED | os.WNOWAIT)  # a zombie whose threads still end is not dead yet
    assert process.call("pid", {})[0] != first


def test_a_child_that_leaves_is_named_with_its_status(process):
    with pytest.raises(WorkerError, match="status 3"):
        process.call("leave", {})


def test_a_cancelled_call_ends_the_child_and_its_children(process, tmp_path):
    with pytest.raises(WorkerError, match="the job was stopped"):
        process.call("hang", {"file": str(tmp_path / "pids")}, cancelled=(tmp_path / "pids").exists)
    assert_ended(wait_for_pids(tmp_path / "pids"))


def test_when_the_parent_is_killed_the_child_and_its_children_end(process, tmp_path):
    code = """
import sys
from pathlib import Path
from nnunet_flare.nnunet.process import NNUNetProcess

process = NNUNetProcess(log_file=Path(sys.argv[1], "nnunet.log"), num_threads=1)
process.call("hang", {"file": str(Path(sys.argv[1], "pids"))})
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as parent:
        pids = wait_for_pids(tmp_path / "pids")
        assert all(map(is_alive, pids))
        parent.kill()
    assert_ended(pids)


def test_an_answer_that_was_not_awaited_is_not_taken_for_the_next_one(process):
    with pytest.raises(ZeroDivisionError):
        process.call("echo", {}, {"w": np.zeros(1)}, progress=lambda *step: 1 / 0)
    assert set(process.call("pid", {})[0]) == {"pid"}


def test_layers_come_back_unchanged_after_progress(process):
    layers = {"weight": np.arange(12, dtype=np.float32).reshape(3, 4), "scale": np.float16([0.5])}
    seen = []
    content, answer = process.call("echo", {}, layers, progress=lambda *progress: seen.append(progress))
    assert content == {"names": ["weight", "scale"]}
    assert seen == [("echo", 1, 2)]
    for name, array in layers.items():
        np.testing.assert_array_equal(answer[name], array, strict=True)


def test_arrays_of_any_size_shape_and_layout_survive_the_pipe():
    generator = np.random.default_rng(0)
    large = generator.normal(size=(64, 32, 3, 3, 3)).astype(np.float32)
    layers = {
        "large": np.tile(large, (8, 1, 1, 1, 1)),
        "0-d": np.float32(3.5).reshape(()),
        "empty": np.empty((0, 3), np.float32),
        "half": large[0].astype(np.float16),
        "transposed": large.T,
        "strided": large[::2, 1:7],
        "reversed": large[::-1],
        "integers": np.arange(5),
        "big-endian": large[0].astype(">f4"),
        "not a number": np.float32([np.nan, np.inf, -0.0]),
    }
    near, far = Pipe()
    writer = threading.Thread(target=send, args=(near, {"round": 3, "name": "Städte"}, layers))
    writer.start()
    content, received = receive(far)
    writer.join()
    assert content == {"round": 3, "name": "Städte"}
    assert list(received) == list(layers)
    for name, array in layers.items():
        assert received[name].dtype == array.dtype
        np.testing.assert_array_equal(received[name], array, strict=True)
