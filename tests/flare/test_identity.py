"""Who a site is towards its peers: by its start-up kit, and in the simulator."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from local_federation import SERVER, LocalFederation

from nnunet_flare.encryption.envelope import open_envelope, peer_certificate, seal
from nnunet_flare.errors import ConfigError, EncryptionError
from nnunet_flare.flare.identity import kit_identity, throw_away_identity
from nnunet_flare.nnunet.site import SiteSettings


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> kit, as FLARE provisions them; nothing runs."""
    federation = LocalFederation(tmp_path_factory.mktemp("identities"))
    federation.provision()
    return federation.kits


@pytest.fixture
def kit(kits: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(kits["hospital-a"], tmp_path / "hospital-a")


def settings_for(site: str, home: Path = Path("/nowhere"), **settings: Any) -> SiteSettings:
    return SiteSettings(site=site, home=home, **settings)


def certificate_in(kit: Path) -> str:
    return (kit / "startup" / "client.crt").read_text()


def test_hospitals_with_kits_of_one_project_know_each_other_and_share_a_secret(kits: dict[str, Path]):
    a, b = (kit_identity(kits[site], settings_for(site)) for site in ("hospital-a", "hospital-b"))
    assert (a.name, b.name) == ("hospital-a", "hospital-b")
    assert a.pem == certificate_in(kits["hospital-a"])
    checked = peer_certificate(b.pem, site="hospital-b", identity=a)
    envelope = seal(b"secret", context={}, to=checked, sender=a)
    sender = peer_certificate(a.pem, site="hospital-a", identity=b)
    assert open_envelope(envelope, context={}, sender=sender, recipient=b) == b"secret"


@pytest.mark.parametrize("role", ["lead", "project_admin", "auditor"])
def test_a_person_s_kit_is_no_peer_under_any_name(kits: dict[str, Path], role: str):
    a = kit_identity(kits["hospital-a"], settings_for("hospital-a"))
    name = next(name for name in kits if name.startswith(role.removeprefix("project_")))
    with pytest.raises(EncryptionError, match="expected that of a hospital, found that of a person"):
        peer_certificate(certificate_in(kits[name]), site=name, identity=a)


def test_the_server_is_no_peer_of_a_hospital(kits: dict[str, Path]):
    a = kit_identity(kits["hospital-a"], settings_for("hospital-a"))
    pem = (kits[SERVER] / "startup" / "server.crt").read_text()
    with pytest.raises(EncryptionError, match="found the server's"):
        peer_certificate(pem, site=SERVER, identity=a)


def test_the_site_s_settings_say_whom_it_accepts(kits: dict[str, Path]):
    pins = {"hospital-b": "00" * 32}
    a = kit_identity(kits["hospital-a"], settings_for("hospital-a", peers=pins))
    assert a.peers == pins
    with pytest.raises(EncryptionError, match="expected fingerprint 0000"):
        peer_certificate(certificate_in(kits["hospital-b"]), site="hospital-b", identity=a)


def elliptic(kit: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (kit / "startup" / "client.key").write_bytes(key.private_bytes(*form))


FAULTS: dict[str, Callable[[Path], object]] = {
    "no certificate": lambda kit: (kit / "startup" / "client.crt").unlink(),
    "no key": lambda kit: (kit / "startup" / "client.key").unlink(),
    "no CA": lambda kit: (kit / "startup" / "rootCA.pem").unlink(),
    "a key that is none": lambda kit: (kit / "startup" / "client.key").write_text("none"),
    "a certificate that is none": lambda kit: (kit / "startup" / "client.crt").write_text("none"),
    "another kind of key": elliptic,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kit_without_a_certificate_and_its_key_cannot_encrypt(kit: Path, fault: str):
    FAULTS[fault](kit)
    with pytest.raises(EncryptionError, match="hospital-a: start-up kit: expected a certificate, its RSA key") as error:
        kit_identity(kit, settings_for("hospital-a"))
    assert str(kit) not in str(error.value)  # which travels


def test_a_person_has_no_identity_of_a_site(kits: dict[str, Path]):
    with pytest.raises(ConfigError, match="expected the kit of a hospital or server"):
        kit_identity(kits["lead@example.org"], settings_for("hospital-a"))


# --- the simulator --------------------------------------------------------------------------------------------------


def test_simulated_sites_share_a_ca_and_each_checks_the_other(tmp_path: Path):
    a, b = (throw_away_identity(settings_for(site, tmp_path)) for site in ("site-1", "site-2"))
    assert a.root == b.root
    assert a.certificate != b.certificate
    for site, peer in ((a, b), (b, a)):
        assert peer_certificate(peer.pem, site=peer.name, identity=site) == peer.certificate
    with pytest.raises(EncryptionError, match="found that of site-1"):
        peer_certificate(a.pem, site="site-2", identity=b)


def test_a_simulated_site_is_the_same_at_every_task(tmp_path: Path):
    first, second = (throw_away_identity(settings_for("site-1", tmp_path)) for _ in range(2))
    assert (first.certificate, first.root) == (second.certificate, second.root)
    assert first.private_key.private_numbers() == second.private_key.private_numbers()


def test_simulated_sites_that_start_at_once_have_one_ca(tmp_path: Path):
    sites = [settings_for(f"site-{number}", tmp_path) for number in range(6)]
    with ThreadPoolExecutor(len(sites)) as pool:
        identities = list(pool.map(throw_away_identity, sites))
    assert len({identity.root for identity in identities}) == 1
    assert [identity.name for identity in identities] == [settings.site for settings in sites]


def test_simulations_in_two_homes_do_not_know_each_other(tmp_path: Path):
    a, b = (throw_away_identity(settings_for("site-1", tmp_path / home)) for home in ("one", "two"))
    with pytest.raises(EncryptionError, match="expected one of the project's CA"):
        peer_certificate(b.pem, site="site-1", identity=a)


def test_even_keys_that_protect_nothing_are_their_owner_s_alone(tmp_path: Path):
    throw_away_identity(settings_for("site-1", tmp_path))
    files = list(tmp_path.rglob("*.key"))
    assert len(files) == 2
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
