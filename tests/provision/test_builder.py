"""Certificates' lifetimes and their renewal; what the builders' arguments put into kits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from local_federation import SERVER, LocalFederation

from nnunet_flare.provision.kit import StartupKit
from nnunet_flare.provision.manifest import PROJECT, PolicyManifest


def builder_args(federation: LocalFederation, name: str) -> dict[str, Any]:
    builder = next(item for item in federation.project["builders"] if item["path"].endswith(name))
    args: dict[str, Any] = builder.setdefault("args", {})
    return args


def certificate(kit: Path, name: str = "client.crt") -> x509.Certificate:
    return x509.load_pem_x509_certificate((kit / "startup" / name).read_bytes())


def days_left(kit: Path, name: str = "client.crt") -> int:
    return round((certificate(kit, name).not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1))


def test_certificates_live_as_long_as_the_project_says(tmp_path: Path):
    federation = LocalFederation(tmp_path)
    builder_args(federation, "ParticipantCertBuilder").update(valid_days=90, root_valid_days=1000)
    federation.provision()
    assert days_left(federation.kits["hospital-a"]) == 90
    assert days_left(federation.kits[SERVER], "server.crt") == 90
    assert days_left(federation.user("lead")) == 90
    assert days_left(federation.kits["hospital-a"], "rootCA.pem") == 1000


def test_no_certificate_outlives_the_ca(tmp_path: Path):
    federation = LocalFederation(tmp_path)
    builder_args(federation, "ParticipantCertBuilder").update(valid_days=90, root_valid_days=40)
    federation.provision()
    assert days_left(federation.kits["hospital-a"]) == 40


def test_central_provisioning_can_require_encryption_of_all_hospitals(tmp_path: Path):
    federation = LocalFederation(tmp_path)
    builder_args(federation, "SitePolicyBuilder").update(require_encryption=True)
    federation.provision()
    required = {name: StartupKit.read_site(federation.kits[name]).policy for name in (SERVER, *federation.sites)}
    assert {name for name, policy in required.items() if policy.require_encryption} == set(federation.sites)
    assert PolicyManifest.check(federation.kits["hospital-a"]).signer == PROJECT


def test_provisioning_again_renews_what_ends_soon_and_nothing_else(tmp_path: Path):
    made = []
    for valid_days, renew_before_days in ((20, 30), (360, 10), (360, 30), (360, 30)):
        federation = LocalFederation(tmp_path)
        builder_args(federation, "ParticipantCertBuilder").update(
            valid_days=valid_days, renew_before_days=renew_before_days
        )
        federation.provision()
        made.append(federation.kits["hospital-a"])
    first, kept, renewed, kept_again = made
    assert certificate(kept) == certificate(first)
    assert days_left(renewed) == 360
    assert certificate(renewed).public_key() != certificate(first).public_key()
    assert certificate(kept_again) == certificate(renewed)
    assert len({certificate(kit, "rootCA.pem") for kit in made}) == 1
