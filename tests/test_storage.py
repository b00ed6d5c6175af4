"""Files that are written whole or not at all, and folders that belong to one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_flare.errors import StateError
from nnunet_flare.storage import FolderLock, read_json, write_atomically, write_json


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_the_previous_file_stays_when_the_writer_fails(tmp_path):
    file = tmp_path / "state.json"
    write_json(file, {"round": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half of ro")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        write_atomically(file, fail)
    assert read_json(file) == {"round": 1}
    assert os.listdir(tmp_path) == ["state.json"]


def test_the_previous_file_stays_when_the_process_is_killed_while_it_writes(tmp_path):
    file = tmp_path / "state.json"
    write_json(file, {"round": 1})
    code = """
import sys, time
from pathlib import Path
from nnunet_flare.storage import write_atomically

def write(temporary):
    temporary.write_text("half of ro")
    print("writing", flush=True)
    time.sleep(60)

write_atomically(Path(sys.argv[1]), write)
"""
    with run_python(code, file) as process:
        assert process.stdout.readline() == "writing\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert read_json(file) == {"round": 1}
    write_json(file, {"round": 2})  # over what the killed process left
    assert read_json(file) == {"round": 2}
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_new_file_appears_in_folders_that_did_not_exist(tmp_path):
    write_json(tmp_path / "a" / "b" / "state.json", {"round": 1})
    assert read_json(tmp_path / "a" / "b" / "state.json") == {"round": 1}


@pytest.mark.parametrize("text", ["", "[1]", '{"round": 1', '"text"', "\x00\xff"])
def test_what_is_no_json_object_is_a_state_error_without_the_path(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(StateError, match=r"state\.json: expected a JSON object") as refusal:
        read_json(tmp_path / "state.json")
    assert str(tmp_path) not in str(refusal.value.to_reply())


def test_a_json_file_that_is_absent_is_a_state_error(tmp_path):
    with pytest.raises(StateError):
        read_json(tmp_path / "state.json")


def test_a_folder_has_one_owner_until_that_one_releases_it(tmp_path):
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(StateError, match="another process holds its lock"):
        FolderLock(tmp_path / "run", patience=0)
    lock.release()
    FolderLock(tmp_path / "run", patience=0).release()


def test_the_lock_goes_with_a_killed_process(tmp_path):
    code = """
import sys, time
from pathlib import Path
from nnunet_flare.storage import FolderLock

lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""
    with run_python(code, tmp_path) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(StateError):
            FolderLock(tmp_path, patience=0)
        process.kill()
        process.wait()
    started = time.monotonic()
    FolderLock(tmp_path).release()
    assert time.monotonic() - started < 2
