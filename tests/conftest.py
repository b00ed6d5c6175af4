"""Every test has its own home; torch works with one thread."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from local_federation import LocalFederation

    from nnunet_flare.flare.config import EncryptionConfig

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["NNUNET_FLARE_HOME"] = "/nonexistent/a-test-must-set-its-home"
for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "NNUNET_FLARE_SETTINGS"):
    os.environ.pop(variable, None)

TINY_TRAINING = {
    "dataset": "Dataset900_Demo",
    "configuration": "2d",
    "num_rounds": 3,
    "iterations_per_epoch": 2,
    "val_iterations_per_epoch": 1,
    "num_foreground_voxels": 10_000,
    "plans_overrides": {"batch_size": 2},
}
"""A training of seconds: it learns nothing, but it does everything."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``NNUNET_FLARE_HOME``; HOME is beside it, so that no tool touches the user's own."""
    monkeypatch.setenv("NNUNET_FLARE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NNUNET_FLARE_SETTINGS", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw data root with a small demo data set for each of three sites: ``<root>/<site>/Dataset900_Demo``."""
    from nnunet_flare.nnunet.phantoms import write_demo_dataset

    root = tmp_path_factory.mktemp("demo_data")
    for site in ("site-1", "site-2", "site-3"):
        write_demo_dataset(root / site, site, num_cases=5)
    return root


@pytest.fixture
def demo_home(home: Path, demo_data: Path) -> Path:
    """A home in which the demo data of three sites (five cases each) lies ready."""
    for site in ("site-1", "site-2", "site-3"):
        shutil.copytree(demo_data / site, home / site / "nnUNet_raw")
    return home


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw data root for each of three sites that plan unlike networks."""
    from nnunet_flare.nnunet.phantoms import write_demo_dataset

    root = tmp_path_factory.mktemp("mixed_data")
    for site in ("site-1", "site-2", "site-3"):
        write_demo_dataset(root / site, site, dataset="demo_mixed", num_cases=5)
    return root


@pytest.fixture
def mixed(home: Path, mixed_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which the raw data of the sites lies ready."""
    for site in ("site-1", "site-2", "site-3"):
        (home / site).mkdir(parents=True)
        (home / site / "nnUNet_raw").symlink_to(mixed_data / site)
    return home


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    """One provisioned federation of real processes for the whole session: a server and three hospitals, connected.

    A test leaves it as it was: these four connected, no others, and no job running.
    """
    from local_federation import SERVER, LocalFederation

    with LocalFederation(tmp_path_factory.mktemp("federation")) as federation:
        federation.provision()
        federation.start(SERVER, *federation.sites)
        federation.wait_until_listening()
        with federation.session() as session:
            federation.wait_for_sites(session)
        yield federation


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net works in this process, without children (``inline``)."""
    from inline import run_inline

    run_inline(monkeypatch)


def settings_of(site: str, folder: Path, **settings: Any) -> None:
    """Write the site's settings into its ``local`` folder."""
    local = folder / site / "local"
    local.mkdir(parents=True, exist_ok=True)
    (local / "nnunet_flare.json").write_text(json.dumps(settings))


def tiny_job(
    folder: Path,
    name: str,
    *,
    training: Mapping[str, Any] | None = None,
    encryption: EncryptionConfig | None = None,
    **federation: Any,
) -> Path:
    """Export a job on the demo data as it is submitted: without the marker of FLARE's simulator.

    Args:
        folder: Where to.
        name: Of the job.
        training: Settings beside those of a tiny training of one round.
        encryption: Of the job.
        **federation: Settings of ``FederationConfig``.
    """
    from nnunet_flare.flare.config import FederationConfig
    from nnunet_flare.nnunet.config import TrainingConfig
    from nnunet_flare.recipe import FFERecipe

    settings = TrainingConfig(**TINY_TRAINING | {"dataset": "demo", "num_rounds": 1} | dict(training or {}))
    recipe = FFERecipe(name=name, training=settings, federation=FederationConfig(**federation), encryption=encryption)
    recipe.export(str(folder))
    shutil.rmtree(folder / name / "app" / "custom")
    return folder / name
