from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from nnunet_flare.errors import PolicyError
from nnunet_flare.provision.guard import is_guarded
from nnunet_flare.provision.manifest import MANIFEST_FILE, PROJECT, SIGNATURE_FILE, SITE, PolicyManifest


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from local_federation import LocalFederation

    federation = LocalFederation(tmp_path_factory.mktemp("provisioned"))
    federation.provision()
    return federation.kits


@pytest.fixture(params=["hospital-a", "localhost"])
def kit(provisioned: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(provisioned[request.param], tmp_path / request.param)


def test_a_provisioned_kit_is_as_the_project_signed_it(kit):
    manifest = PolicyManifest.check(kit)
    assert manifest.signer == PROJECT
    names = {"resources.json", "privacy.json", "authorization.json"}
    assert {f"local/{name}" for name in names} <= manifest.files.keys()
    assert sum(name.startswith("startup/fed_") for name in manifest.files) == 1
    assert not any("nnunet_flare.json" in name for name in manifest.files)


def test_a_changed_file_is_named(kit):
    file = kit / "local" / "authorization.json"
    file.write_text(file.read_text().replace('"none"', '"any"', 1))
    with pytest.raises(PolicyError, match=r"found local/authorization\.json was changed;"):
        PolicyManifest.check(kit)


@pytest.mark.parametrize("name", ["local/resources.json", "local/resources.json.default", "local/privacy.json"])
def test_a_removed_file_is_named(kit, name):
    (kit / name).unlink()
    with pytest.raises(PolicyError, match=f"found {name} was removed;"):
        PolicyManifest.check(kit)


@pytest.mark.parametrize(
    "name",
    [
        "local/job_resources.json",
        "local/more__resources.json",
        "local/more__p_resources.json",
        "startup/more__j_resources.json",
        "local/comm_config.json",
        "startup/comm_config.json",
        "transfer/deep/comm_config.json",
        "resources.json",
        "startup/resources.json",
        "local/log_config.json",
        "local/study_registry.json",
    ],
)
def test_a_file_that_flare_would_read_as_well_is_named_when_it_is_added(kit, name):
    (kit / name).parent.mkdir(parents=True, exist_ok=True)
    (kit / name).write_text("{}")
    with pytest.raises(PolicyError, match=f"found {name} was added;"):
        PolicyManifest.check(kit)


def test_every_change_is_named(kit):
    (kit / "local" / "privacy.json").unlink()
    (kit / "local" / "comm_config.json").write_text("{}")
    with pytest.raises(PolicyError, match=r"comm_config\.json was added, local/privacy\.json was removed"):
        PolicyManifest.check(kit)


def test_what_flare_writes_while_it_runs_is_no_change(kit):
    for name in ("log.txt", "audit.log", "local/nnunet_flare.json", "transfer/result.json"):
        (kit / name).write_text("{}")
    PolicyManifest.check(kit)


def test_a_kit_counts_as_guarded_until_nothing_of_the_policy_is_left(kit, tmp_path):
    assert is_guarded(kit)
    for name in (MANIFEST_FILE, SIGNATURE_FILE):
        (kit / name).unlink()
    assert is_guarded(kit)
    assert not is_guarded(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST_FILE, SIGNATURE_FILE])
def test_a_missing_record_is_refused(kit, name):
    (kit / name).unlink()
    with pytest.raises(PolicyError, match=f"{Path(name).name} is missing"):
        PolicyManifest.check(kit)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"signer": "project", "files": 3}', '{"signer": "x", "files": {}}']
)
def test_a_record_of_another_form_is_refused(kit, content):
    (kit / MANIFEST_FILE).write_text(content)
    with pytest.raises(PolicyError, match="site policy: expected"):
        PolicyManifest.check(kit)


def test_a_record_that_was_edited_is_refused(kit):
    """Digests made to fit a changed file; the signature does not."""
    (kit / "local" / "comm_config.json").write_text("{}")
    record = PolicyManifest.write(kit).files
    (kit / MANIFEST_FILE).write_text(json.dumps({"signer": PROJECT, "files": record}))
    with pytest.raises(PolicyError, match="expected a record signed by the project, found another signature"):
        PolicyManifest.check(kit)


@pytest.mark.parametrize("signature", [b"", b"bm8=", b"no base64 at all"])
def test_another_signature_is_refused(kit, signature):
    (kit / SIGNATURE_FILE).write_bytes(signature)
    with pytest.raises(PolicyError, match="another signature"):
        PolicyManifest.check(kit)


def test_the_signature_of_a_stranger_is_refused(kit):
    PolicyManifest.write(kit, key=rsa.generate_private_key(public_exponent=65537, key_size=2048))
    with pytest.raises(PolicyError, match="another signature"):
        PolicyManifest.check(kit)


def test_the_record_of_another_site_is_refused(kit, provisioned):
    PolicyManifest.write(kit)
    other = shutil.copytree(provisioned["hospital-b"], kit.parent / "hospital-b")
    PolicyManifest.write(other)
    for name in (MANIFEST_FILE, SIGNATURE_FILE):
        shutil.copy(other / name, kit / name)
    with pytest.raises(PolicyError, match="another signature"):
        PolicyManifest.check(kit)


def test_a_ca_of_another_kind_of_key_is_refused(kit):
    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    (kit / "startup" / "rootCA.pem").write_bytes(certificate)
    with pytest.raises(PolicyError, match="another signature"):
        PolicyManifest.check(kit)


def test_a_change_that_the_site_records_is_signed_by_the_site(kit):
    file = kit / "local" / "resources.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    recorded = PolicyManifest.write(kit)
    assert recorded.signer == SITE
    assert PolicyManifest.check(kit) == recorded
