"""The rules of the house that a machine can check."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_flare.flare.protocol import KEY_TASKS
from nnunet_flare.recipe import JOBS

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "custom" / "nnunet_flare").rglob("*.py"))


def test_imports_point_downward_only():
    result = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", JOBS)
def test_the_committed_job_equals_its_recipe(name: str, tmp_path: Path):
    JOBS[name]().export(str(tmp_path))

    def files(folder: Path) -> dict[str, str]:
        return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}

    assert files(ROOT / "jobs" / name) == files(tmp_path / name)


@pytest.mark.parametrize("name", [name for name in JOBS if name.endswith("_he")])
def test_an_encrypted_job_is_its_plain_twin_with_a_key_and_filters_on_every_task(name: str):
    files = ("meta.json", "app/config/config_fed_server.json", "app/config/config_fed_client.json")
    twin = [json.loads((ROOT / "jobs" / name.removesuffix("_he") / file).read_text()) for file in files]
    meta, server, client = (json.loads((ROOT / "jobs" / name / file).read_text()) for file in files)
    (workflow,), (executor,) = server["workflows"], client["executors"]
    tasks = executor["tasks"]
    for side, kind in (("task_data_filters", "BFVDecryptFilter"), ("task_result_filters", "BFVEncryptFilter")):
        filters = [{"path": f"nnunet_flare.flare.filters.{kind}", "args": {}}]
        assert client[side] == [{"tasks": tasks, "filters": filters}]
        client[side] = []
    assert meta.pop("name") == workflow["args"].pop("run") == name
    assert twin[0].pop("name") == twin[1]["workflows"][0]["args"].pop("run") == name.removesuffix("_he")
    assert workflow["args"].pop("encryption")
    executor["tasks"] = [task for task in tasks if task not in KEY_TASKS]
    assert tasks == [*executor["tasks"], *KEY_TASKS]
    assert [meta, server, client] == twin


def test_a_recipe_exports_the_same_job_whatever_the_order_of_sets(tmp_path: Path):
    code = "import sys; from nnunet_flare.recipe import JOBS; JOBS['ffe_he']().export(sys.argv[1])"
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, tmp_path / seed]
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True)
    file = Path("ffe_he", "app", "config", "config_fed_client.json")
    assert (tmp_path / "1" / file).read_text() == (tmp_path / "2" / file).read_text()


@pytest.mark.parametrize("module", ["nnunet_flare.flare.ffe", "nnunet_flare.flare.executor", "nnunet_flare.cli"])
def test_flares_processes_do_not_load_torch(module: str):
    code = f"import sys, {module}; print(sorted({{'torch', 'nnunetv2', 'monai'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nothing_is_pickled_and_torch_loads_weights_only():
    for file in SOURCES:
        text = file.read_text()
        assert not re.search(r"\bpickle\b\.|import pickle|allow_pickle=True|\.recv\(\)|conn\.send\(", text), file
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{file}: {call}"


def test_every_module_says_what_it_is_for():
    silent = [str(file) for file in SOURCES if file.read_text().strip() and not file.read_text().startswith('"""')]
    assert silent == []
