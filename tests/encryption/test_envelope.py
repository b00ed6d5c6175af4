"""Only the hospital that is meant opens an envelope, and only one that a hospital of the project has sealed."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certificates import DAY, Project
from nnunet_flare.encryption import envelope as implementation
from nnunet_flare.encryption.envelope import open_envelope, peer_certificate, seal
from nnunet_flare.errors import EncryptionError

PROJECT = Project()
A, B, C = (PROJECT.identity(name) for name in ("hospital-a", "hospital-b", "hospital-c"))
CONTENT = bytes(range(256)) * 100  # far more than RSA alone can take
CONTEXT = {"run_id": "1", "from": "hospital-a", "to": "hospital-b"}


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def fingerprint(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex()


def sealed() -> dict[str, str]:
    return seal(CONTENT, context=CONTEXT, to=B.certificate, sender=A)


def refusal(envelope: Any, **how: Any) -> str:
    with pytest.raises(EncryptionError) as refused:
        open_envelope(envelope, **{"context": CONTEXT, "sender": A.certificate, "recipient": B} | how)
    return str(refused.value)


# --- envelopes --------------------------------------------------------------------------------------------------------


def test_the_recipient_reads_what_was_sealed_and_nobody_reads_it_on_the_way():
    envelope = sealed()
    assert open_envelope(envelope, context=CONTEXT, sender=A.certificate, recipient=B) == CONTENT
    on_the_way = b"".join(base64.b64decode(part) for part in envelope.values())
    assert CONTENT[:16] not in on_the_way


def test_no_two_envelopes_are_alike():
    first, second = sealed(), sealed()
    assert not [part for part in first if first[part] == second[part]]


def test_another_recipient_cannot_open_it():
    assert "envelope of the key: expected one that the key holder sealed" in refusal(sealed(), recipient=C)


def test_the_signature_of_another_site_is_not_taken_for_the_named_one():
    forged = seal(CONTENT, context=CONTEXT, to=B.certificate, sender=C)
    assert "InvalidSignature" in refusal(forged)


def test_a_site_cannot_sign_another_s_sealed_key_as_its_own():
    envelope, own = sealed(), CONTEXT | {"from": "hospital-c"}
    again = seal(b"", context=own, to=B.certificate, sender=C)
    parts = {name: base64.b64decode(envelope[name]) for name in ("wrapped", "nonce", "sealed")}
    signature = C.private_key.sign(implementation._signed(parts, own), implementation._PSS, hashes.SHA256())
    stolen = envelope | {"signature": base64.b64encode(signature).decode()}
    assert open_envelope(again, context=own, sender=C.certificate, recipient=B) == b""
    assert "InvalidTag" in refusal(stolen, context=own, sender=C.certificate)


@pytest.mark.parametrize("changed", [{"run_id": "2"}, {"to": "hospital-c"}, {"from": "hospital-c"}, {"more": ""}])
def test_another_context_does_not_open_it(changed: dict[str, str]):
    assert "InvalidSignature" in refusal(sealed(), context=CONTEXT | changed)


def flipped(text: str) -> str:
    content = bytearray(base64.b64decode(text))
    content[len(content) // 2] ^= 1
    return base64.b64encode(content).decode()


DAMAGE: dict[str, Callable[[str], Any]] = {
    "a flipped bit": flipped,
    "the last byte": lambda text: base64.b64encode(base64.b64decode(text)[:-1]).decode(),
    "nothing": lambda text: "",
    "no base64": lambda text: f"*{text}",
    "no text": lambda text: None,
    "no ASCII": lambda text: "\u00e9",
}


@pytest.mark.parametrize("part", ["wrapped", "nonce", "sealed", "signature"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_part_that_was_tampered_with_is_refused(part: str, damage: str):
    envelope = sealed()
    assert "or a damaged one" in refusal(envelope | {part: DAMAGE[damage](envelope[part])})


@pytest.mark.parametrize("part", ["wrapped", "nonce", "sealed", "signature"])
def test_a_missing_part_is_refused(part: str):
    assert "KeyError" in refusal({name: text for name, text in sealed().items() if name != part})


# --- certificates -----------------------------------------------------------------------------------------------------


def test_a_peer_s_certificate_is_taken():
    assert peer_certificate(B.pem, site="hospital-b", identity=A) == B.certificate


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "another CA's": (lambda: pem(Project("other").certify("hospital-b")), "expected one of the project's CA"),
    "a forger's in the CA's name": (
        lambda: pem(Project(PROJECT.name, key="forger").certify("hospital-b")),
        "expected one of the project's CA, found InvalidSignature",
    ),
    "another site's": (lambda: C.pem, "expected that of hospital-b, found that of hospital-c"),
    "expired": (lambda: pem(PROJECT.certify("hospital-b", end=-timedelta(minutes=1))), "found one that is out of date"),
    "of tomorrow": (lambda: pem(PROJECT.certify("hospital-b", start=DAY)), "found one that is out of date"),
    "a person's": (lambda: pem(PROJECT.certify("hospital-b", role="lead")), "found that of a person"),
    "of another kind of key": (
        lambda: pem(PROJECT.certify("hospital-b", ec.generate_private_key(ec.SECP256R1()))),
        "found ValueError",
    ),
    "none": (lambda: "none", "expected one of the project's CA"),
    "empty": (lambda: "", "expected one of the project's CA"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_a_certificate_that_is_not_the_peer_s_is_refused(which: str):
    made, reason = REFUSED[which]
    with pytest.raises(EncryptionError, match=reason) as refused:
        peer_certificate(made(), site="hospital-b", identity=A)
    assert refused.value.site == "hospital-b"
    assert "not through the server" in refused.value.remedy


@pytest.mark.parametrize("value", [None, 1, ["x"]])
def test_what_is_no_text_is_refused_as_no_certificate(value: Any):
    with pytest.raises(EncryptionError, match="expected one of the project's CA"):
        peer_certificate(value, site="hospital-b", identity=A)


def test_the_server_is_no_peer():
    site = PROJECT.identity("hospital-a", not_peers=("flare.example.org",))
    with pytest.raises(EncryptionError, match="expected that of a hospital, found the server's"):
        peer_certificate(pem(PROJECT.certify("flare.example.org")), site="flare.example.org", identity=site)


@pytest.mark.parametrize("write", [str, str.upper, lambda text: ":".join(text[i : i + 2] for i in range(0, 64, 2))])
def test_a_pinned_certificate_is_taken_however_its_fingerprint_is_written(write: Callable[[str], str]):
    site = PROJECT.identity("hospital-a", peers={"hospital-b": write(fingerprint(B.certificate))})
    assert peer_certificate(B.pem, site="hospital-b", identity=site) == B.certificate


def test_another_certificate_than_the_pinned_one_is_refused_though_the_ca_signed_it():
    site = PROJECT.identity("hospital-a", peers={"hospital-b": fingerprint(B.certificate)})
    other = PROJECT.certify("hospital-b")  # the same name and key, and another number
    with pytest.raises(EncryptionError, match=f"expected fingerprint .*, found {fingerprint(other)}"):
        peer_certificate(pem(other), site="hospital-b", identity=site)


def test_who_is_not_pinned_is_no_peer_of_a_site_that_pins():
    site = PROJECT.identity("hospital-a", peers={"hospital-b": fingerprint(B.certificate)})
    with pytest.raises(EncryptionError, match="peers: expected one of hospital-b, as this site's settings say"):
        peer_certificate(C.pem, site="hospital-c", identity=site)


def test_a_site_that_pins_its_peers_need_not_pin_itself():
    """The key holder seals the key for itself too."""
    site = PROJECT.identity("hospital-a", peers={"hospital-b": fingerprint(B.certificate)})
    assert peer_certificate(site.pem, site="hospital-a", identity=site) == site.certificate
    with pytest.raises(EncryptionError, match="peers: expected one of hospital-b"):
        peer_certificate(pem(PROJECT.certify("hospital-a", C.private_key)), site="hospital-a", identity=site)


def test_a_private_key_does_not_show():
    assert "private_key" not in repr(A)
