"""Hospitals that come later: by central provisioning, and with a key of their own."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from commands import run
from conftest import tiny_job
from nnunet_flare.errors import ConfigError
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.provision.ca import export_ca
from nnunet_flare.provision.manifest import PROJECT, SITE, PolicyManifest

if TYPE_CHECKING:
    from local_federation import LocalFederation


def digests(folder: Path) -> dict[str, str]:
    files = [file for part in ("startup", "local") for file in (folder / part).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def join_by_request(federation: LocalFederation, name: str, folder: Path) -> Path:
    """A hospital makes its own key; only a request and the answer to it travel. Returns its kit."""
    hospital, coordinator = folder / "hospital", folder / "coordinator"
    coordinator.mkdir()
    project, server = federation.project, federation.project["participants"][0]
    state = federation.folder / "kits" / project["name"] / "state"
    fingerprint = run("nnunet-flare", "ca", str(state), "--out", "ca", folder=coordinator).splitlines()[-1]
    profile = {
        "name": project["name"],
        "scheme": "grpc",
        "connection_security": "mtls",
        "server": {"host": server["name"], "fed_learn_port": server["fed_learn_port"]},
    }
    (coordinator / "project_profile.yaml").write_text(yaml.safe_dump(profile))
    hospital.mkdir()
    participant = {"name": name, "type": "client", "org": "hospital_e"}
    builders = [{"path": "nnunet_flare.provision.builder.SitePolicyBuilder", "args": {}}]
    request = {"name": project["name"], "participants": [participant], "builders": builders}
    (hospital / "hospital.yaml").write_text(yaml.safe_dump(request))
    run("nvflare", "cert", "request", "-p", "hospital.yaml", "--out", "request", folder=hospital)
    shutil.copy(hospital / "request" / f"{name}.request.zip", coordinator)
    arguments = ["--ca-dir", "ca", "--profile", "project_profile.yaml", "--valid-days", "360"]
    run(
        "nvflare",
        "cert",
        "approve",
        f"{name}.request.zip",
        *arguments,
        "--out",
        f"{name}.signed.zip",
        folder=coordinator,
    )
    shutil.copy(coordinator / f"{name}.signed.zip", hospital)
    arguments = ["--request-dir", "request", "--fingerprint", fingerprint, "-w", "kits"]
    run("nvflare", "package", f"{name}.signed.zip", *arguments, folder=hospital)
    return hospital / "kits" / project["name"] / "prod_00" / name


@pytest.mark.federation
def test_a_fourth_and_a_fifth_hospital_join_and_no_old_kit_changes(federation: LocalFederation, tmp_path: Path):
    before = {name: digests(kit) for name, kit in federation.kits.items()}
    workspace = federation.folder / "kits"
    project, added = tmp_path / "project.yml", tmp_path / "hospital-d.yml"
    project.write_text(yaml.safe_dump(federation.project))
    added.write_text(yaml.safe_dump({"name": "hospital-d", "org": "hospital_d"}))
    arguments = ["-p", str(project), "-w", str(workspace), "--add-client", str(added), "--force"]
    run("nvflare", "provision", *arguments, folder=tmp_path)
    fourth = workspace / federation.project["name"] / "prod_01" / "hospital-d"
    assert PolicyManifest.check(fourth).signer == PROJECT
    fifth = join_by_request(federation, "hospital-e", tmp_path)
    assert PolicyManifest.check(fifth).signer == SITE
    assert oct((fifth / "startup" / "client.key").stat().st_mode)[-3:] == "600"
    files = [file for file in (tmp_path / "coordinator").rglob("*") if file.is_file()]
    keys = [file.name for file in files if b"PRIVATE KEY" in file.read_bytes()]
    assert keys == ["rootCA.key"]
    assert {name: digests(kit) for name, kit in federation.kits.items()} == before

    for kit in (fourth, fifth):
        federation.adopt(kit)
        federation.start(kit.name)
    try:
        assert federation.run_job(tiny_job(tmp_path, "five"))["status"] == "FINISHED:COMPLETED"
    finally:
        federation.stop("hospital-d", "hospital-e")
        with federation.session("project_admin") as session:
            for name in ("hospital-d", "hospital-e"):
                session.remove_client(name)
                del federation.kits[name]
    history = RunHistory.load(federation.home / "server" / "runs" / "five")
    sites = {f"hospital-{letter}" for letter in "abcde"}
    assert set(history.rounds[0].sites) == sites
    assert set(history.final) == sites


def test_a_folder_that_is_no_state_of_a_project_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"state folder of a project, found no cert.json"):
        export_ca(tmp_path, tmp_path / "ca")
