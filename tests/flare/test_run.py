"""The folder of a run: what continues, what is archived, what is refused, what a full disk leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.errors import ConfigError, StateError
from nnunet_flare.flare.run import RunFolder

SETTINGS = {"num_rounds": 3, "dataset": "Dataset900_Demo"}
LAYERS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.float32([1.0])}


@pytest.fixture
def run(tmp_path: Path):
    run = RunFolder(tmp_path, "heart")
    yield run
    run.close()


def test_an_unfinished_run_continues_under_its_id(run, tmp_path):
    run_id = run.begin(SETTINGS)
    run.close()
    assert RunFolder(tmp_path, "heart").begin(dict(reversed(SETTINGS.items()))) == run_id


def test_a_finished_run_is_archived_whole_and_a_new_one_starts(run, tmp_path):
    run_id = run.begin(SETTINGS)
    run.save_global(0, LAYERS)
    run.finish()
    assert run.begin({"num_rounds": 5}) != run_id
    assert run.load_global() is None
    (archived,) = (tmp_path / "runs" / "archive").iterdir()
    assert archived.name.startswith("heart-")
    assert (archived / "state" / "global_00000.npz").exists()


def test_the_sealed_key_of_an_encrypted_run_is_not_archived(run, tmp_path):
    run.follow("one", SETTINGS)
    (run.path / "encryption").mkdir()
    (run.path / "encryption" / "key.json").write_text("{}")
    run.follow("two", SETTINGS)
    (archived,) = (tmp_path / "runs" / "archive").iterdir()
    assert [file.name for file in archived.iterdir()] == ["run.json"]


def test_a_name_may_be_used_and_archived_many_times(run, tmp_path):
    ids = set()
    for _ in range(3):
        ids.add(run.begin(SETTINGS))
        run.finish()
    assert len(ids) == 3
    assert len(list((tmp_path / "runs" / "archive").iterdir())) == 2


def test_a_finished_run_is_taken_up_again_by_a_job_of_its_series_with_its_settings_alone(run, tmp_path):
    run_id = run.begin(SETTINGS, "one")
    run.finish()
    assert run.begin(SETTINGS, "one") == run_id
    assert run.begin({"num_rounds": 5}, "one") != run_id
    assert len(list((tmp_path / "runs" / "archive").iterdir())) == 1


def test_an_unfinished_run_belongs_to_the_series_that_went_on_with_it_last(run):
    run_id = run.begin(SETTINGS, "one")
    assert run.begin(SETTINGS, "two") == run_id
    run.finish()
    assert run.begin(SETTINGS, "two") == run_id
    assert run.begin(SETTINGS, "one") != run_id


def test_a_finished_run_without_a_series_is_never_taken_up_again(run):
    run_id = run.begin(SETTINGS)
    run.finish()
    assert run.begin(SETTINGS) != run_id


def test_other_settings_under_the_name_of_an_unfinished_run_are_refused_with_both_values(run):
    run_id = run.begin(SETTINGS)
    run.save_global(0, {"w": np.zeros(1, np.float32)})
    with pytest.raises(ConfigError) as refusal:
        run.begin({"num_rounds": 7, "dataset": "Dataset900_Demo", "fold": 1})
    error = refusal.value
    assert error.field == "run heart: fold, num_rounds"
    assert "num_rounds=3" in error.expected
    assert "num_rounds=7" in error.found
    assert "fold=1" in error.found
    assert "dataset" not in str(error)
    assert run.begin(SETTINGS) == run_id


def test_a_run_without_weights_gives_way_to_corrected_settings_and_is_archived(run, tmp_path):
    run_id = run.begin({"configuration": "3d_fulres"})
    assert run.begin({"configuration": "3d_fullres"}) != run_id
    assert len(list((tmp_path / "runs" / "archive").iterdir())) == 1


def test_a_site_follows_the_servers_run_and_archives_another_of_its_name(run, tmp_path):
    run.follow("a" * 32, SETTINGS)
    run.save_global(1, LAYERS)
    run.follow("a" * 32, SETTINGS)
    assert run.load_global() is not None
    run.follow("b" * 32, SETTINGS)
    assert run.load_global() is None
    assert len(list((tmp_path / "runs" / "archive").iterdir())) == 1


def test_a_broken_manifest_is_a_state_error_and_nothing_is_lost(run):
    run.begin(SETTINGS)
    run.save_global(0, LAYERS)
    (run.path / "run.json").write_text('{"run_id": "a')
    with pytest.raises(StateError, match=r"run\.json"):
        run.begin(SETTINGS)
    assert run.load_global() is not None


@pytest.mark.parametrize("content", ["{}", '{"run_id": "a"}', '{"run_id": "a", "finished": false}'])
def test_a_manifest_of_another_form_is_a_state_error(run, content):
    run.begin(SETTINGS)
    (run.path / "run.json").write_text(content)
    for use in (lambda: run.begin(SETTINGS), lambda: run.follow("a" * 32, SETTINGS)):
        with pytest.raises(StateError, match=r"run\.json"):
            use()


def test_a_second_process_on_the_same_run_is_refused_until_the_first_is_killed(tmp_path, monkeypatch):
    code = """
import sys, time
from pathlib import Path
from nnunet_flare.flare.run import RunFolder

run = RunFolder(Path(sys.argv[1]), "heart")
print(run.begin({"num_rounds": 3, "dataset": "Dataset900_Demo"}), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        run_id = other.stdout.readline().strip()
        clock = iter(range(0, 10_000, 20))
        monkeypatch.setattr("nnunet_flare.storage.time.monotonic", lambda: next(clock))
        with pytest.raises(StateError, match="another process holds its lock"):
            RunFolder(tmp_path, "heart")
        RunFolder(tmp_path, "lung").close()
        other.kill()
        other.wait()
    run = RunFolder(tmp_path, "heart")
    assert run.begin(SETTINGS) == run_id
    run.close()


def test_the_two_newest_global_files_stay_and_the_newest_is_loaded(run):
    for round_number in range(4):
        run.save_global(round_number, {"weight": np.float32([round_number])})
    assert sorted(os.listdir(run.path / "state")) == ["global_00002.npz", "global_00003.npz"]
    round_number, layers = run.load_global()
    assert round_number == 3
    np.testing.assert_array_equal(layers["weight"], np.float32([3]))


def test_layers_come_back_as_they_were(run):
    layers = LAYERS | {"0-d": np.float32(2.0).reshape(()), "half": np.float16([0.5]), "a.b-c/d": np.zeros((0, 2))}
    run.save_global(0, layers)
    _, loaded = run.load_global()
    assert loaded.keys() == layers.keys()
    for name, array in layers.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)


def test_before_the_first_global_file_there_is_none_to_load(run):
    run.begin(SETTINGS)
    assert run.load_global() is None


def test_a_partial_file_of_a_killed_process_is_not_loaded(run):
    run.save_global(1, LAYERS)
    (run.path / "state" / ".global_00002.npz.partial").write_bytes(b"PK half of it")
    assert run.load_global()[0] == 1


@pytest.mark.parametrize("content", [b"", b"PK half of it", b"\x93NUMPY"])
def test_a_damaged_global_file_is_a_state_error(run, content):
    run.save_global(1, LAYERS)
    (run.path / "state" / "global_00002.npz").write_bytes(content)
    with pytest.raises(StateError, match=r"global_00002\.npz"):
        run.load_global()


ON_A_FULL_DISK = """
import os, resource, sys
from pathlib import Path

import numpy as np

from nnunet_flare.flare.run import RunFolder

run = RunFolder(Path(sys.argv[1]), "heart")
layers = {name: np.full(10_000, 1, np.float32) for name in ("a", "b", "c")}
run.save_global(1, layers)
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))
else:
    disk = os.statvfs(sys.argv[1])
    Path(sys.argv[1], "ballast").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 70_000))
try:
    run.save_global(2, layers)
except OSError as error:
    print(error.strerror)
round_number, loaded = run.load_global()
print(round_number, *os.listdir(run.path / "state"))
"""


def save_on_a_full_disk(folder: Path, kind: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, str(folder), kind], capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_a_file_size_limit_keeps_the_previous_file_and_leaves_no_partial_one(tmp_path):
    assert save_on_a_full_disk(tmp_path, "limit") == ["File too large", "1 global_00001.npz"]


def test_a_full_disk_keeps_the_previous_file_and_leaves_no_partial_one(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        assert save_on_a_full_disk(tmp_path, "disk") == ["No space left on device", "1 global_00001.npz"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../heart", "a/b", "/heart", "archive", ".locks", "-heart", "a b", "a\n", "ä", "a" * 101]
)
def test_a_name_that_is_no_plain_folder_name_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ConfigError, match="run: expected letters, digits"):
        RunFolder(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ffe", "heart-2", "heart_2.1", "0", "a" * 100])
def test_plain_names_are_accepted(tmp_path, name):
    run = RunFolder(tmp_path, name)
    assert run.path == tmp_path / "runs" / name
    run.close()
