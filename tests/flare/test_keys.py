"""A site's hold on the key of a run: where it comes from, where it lies, and what is no key of this run."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from certificates import Project
from nnunet_flare.encryption.envelope import seal
from nnunet_flare.encryption.key import AggregationKey
from nnunet_flare.encryption.parameters import PARAMETERS, Parameters
from nnunet_flare.errors import EncryptionError, NNUNetFlareError
from nnunet_flare.flare import keys
from nnunet_flare.flare.keys import SiteKeys
from nnunet_flare.nnunet.site import SiteSettings

PROJECT = Project()
SITES = ("hospital-a", "hospital-b", "hospital-c")
IDENTITIES = {site: PROJECT.identity(site) for site in SITES}
PEM = {site: identity.pem for site, identity in IDENTITIES.items()}
SET = Parameters.for_sites(3).id


@pytest.fixture(autouse=True)
def other_processes() -> Iterator[None]:
    """No test sees a key that another has opened."""
    keys._open.clear()
    yield
    keys._open.clear()


@pytest.fixture
def keys_of(tmp_path: Path) -> Callable[..., SiteKeys]:
    """A site's keys, by its name and the run's id."""

    def make(site: str, run_id: str = "1", run: str = "run") -> SiteKeys:
        settings = SiteSettings(site=site, home=tmp_path)
        return SiteKeys(settings.folder / "runs" / run, run_id, IDENTITIES[site], settings)

    return make


def sealed_file(folder: Path, site: str) -> Path:
    return folder / site / "runs" / "run" / "encryption" / "key.json"


def refused(give: Callable[[], object]) -> str:
    with pytest.raises(EncryptionError) as error:
        give()
    return str(error.value)


def travelled(value: Any) -> Any:
    """As JSON, which is how it reaches the server and leaves it."""
    return json.loads(json.dumps(value))


def test_the_key_holder_s_key_reaches_every_site_and_no_two_runs_have_the_same(keys_of, tmp_path):
    made, envelopes = keys_of("hospital-a").make(SET, PEM)
    assert {keys_of(site).receive(travelled(envelopes[site])) for site in SITES} == {made}
    opened = [keys_of(site).key() for site in SITES]
    assert len({(key.id, key.secret, key.mark_key) for key in opened}) == 1
    assert opened[0].parameters == PARAMETERS[SET]
    assert keys_of("hospital-a", run="other").make(SET, PEM)[0] != made


def test_neither_what_travels_nor_what_is_stored_shows_the_key(keys_of, tmp_path):
    _, envelopes = keys_of("hospital-a").make(SET, PEM)
    keys_of("hospital-b").receive(envelopes["hospital-b"])
    key = keys_of("hospital-b").key()
    for text in (json.dumps(envelopes), sealed_file(tmp_path, "hospital-b").read_text()):
        for secret in (key.mark_key, key.secret):
            for start in range(3):  # of the three ways in which base64 may cut it
                assert base64.b64encode(secret[start : start + 24]).decode() not in text


def test_a_key_is_made_anew_only_where_there_is_none_and_sealed_again_where_there_is_one(keys_of):
    holder = keys_of("hospital-a")
    made, envelopes = holder.make(SET, PEM)
    holder.receive(envelopes["hospital-a"])
    again, second = holder.make(SET, {"hospital-c": PEM["hospital-c"]})
    assert (again, list(second)) == (made, ["hospital-c"])
    assert keys_of("hospital-c").receive(second["hospital-c"]) == made


def test_nothing_is_sealed_for_anybody_if_one_certificate_is_wrong(keys_of, tmp_path):
    wrong = PEM | {"hospital-c": PEM["hospital-b"]}
    assert "expected that of hospital-c, found that of hospital-b" in refused(
        lambda: keys_of("hospital-a").make(SET, wrong)
    )
    assert not (tmp_path / "hospital-a" / "runs").exists()
    assert keys._open == {}


def test_parameters_of_another_version_are_refused(keys_of):
    assert "parameters: expected one of bfv-4096" in refused(lambda: keys_of("hospital-a").make("bfv-1", PEM))


def test_a_site_without_a_key_says_so(keys_of):
    site = keys_of("hospital-a")
    assert not site.has_key
    assert "hospital-a: key: expected the key of an encrypted run, found none" in refused(site.key)


# --- what is no envelope of this run and site -----------------------------------------------------------------------


def test_the_envelope_of_another_run_is_refused(keys_of, tmp_path):
    _, envelopes = keys_of("hospital-a", run_id="1").make(SET, PEM)
    other = keys_of("hospital-b", run_id="2")
    relabelled = travelled(envelopes["hospital-b"])
    relabelled["context"]["run_id"] = "2"
    for sent in (envelopes["hospital-b"], relabelled):
        assert "envelope of the key" in refused(lambda sent=sent: other.receive(sent))
    assert not sealed_file(tmp_path, "hospital-b").exists()


def test_the_envelope_of_another_site_is_refused(keys_of, tmp_path):
    _, envelopes = keys_of("hospital-a").make(SET, PEM)
    relabelled = travelled(envelopes["hospital-b"])
    relabelled["context"]["to"] = "hospital-c"
    for sent in (envelopes["hospital-b"], relabelled):
        assert "envelope of the key" in refused(lambda sent=sent: keys_of("hospital-c").receive(sent))
    assert not sealed_file(tmp_path, "hospital-c").exists()


def forged(*, signer: Any, sender_pem: str, name: str = "hospital-a", key_id: str | None = None) -> dict[str, Any]:
    """A key that the server has made, sealed for hospital-b in the name of hospital-a."""
    key = AggregationKey.new(PARAMETERS[SET])
    context = {"run_id": "1", "key": key_id or key.id, "from": name, "to": "hospital-b"}
    envelope = seal(key.to_bytes(), context=context, to=IDENTITIES["hospital-b"].certificate, sender=signer)
    return {"context": context, "sender": sender_pem, "envelope": envelope}


FORGERIES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "signed by another site, with the certificate of the named": (
        lambda: forged(signer=IDENTITIES["hospital-c"], sender_pem=PEM["hospital-a"]),
        "InvalidSignature",
    ),
    "signed by another site, with its own certificate": (
        lambda: forged(signer=IDENTITIES["hospital-c"], sender_pem=PEM["hospital-c"]),
        "expected that of hospital-a, found that of hospital-c",
    ),
    "signed by a stranger": (
        lambda: forged(signer=Project("other").identity("hospital-a"), sender_pem=Project("other").identity("x").pem),
        "one of the project's CA",
    ),
    "signed by a person": (
        lambda: forged(
            signer=PROJECT.identity("lead@example.org"),
            sender_pem=PROJECT.identity("lead@example.org", role="lead").pem,
            name="lead@example.org",
        ),
        "found that of a person",
    ),
    "another key than the context says": (
        lambda: forged(signer=IDENTITIES["hospital-a"], sender_pem=PEM["hospital-a"], key_id="0" * 32),
        "envelope of the key",
    ),
}


@pytest.mark.parametrize("which", FORGERIES)
def test_a_forged_envelope_is_refused(keys_of, tmp_path, which: str):
    made, reason = FORGERIES[which]
    assert reason in refused(lambda: keys_of("hospital-b").receive(made()))
    assert not sealed_file(tmp_path, "hospital-b").exists()


@pytest.mark.parametrize("sent", [{}, {"context": {}}, {"context": None}, {"context": {"key": 1, "from": 2}}, [], None])
def test_what_is_no_envelope_is_refused(keys_of, sent: Any):
    assert "envelope of the key" in refused(lambda: keys_of("hospital-b").receive(sent))


def test_an_envelope_that_holds_no_key_is_refused(keys_of):
    for content in (b"", b"{}", b"[]", b"\xff", b'{"id": "k", "parameters": "bfv-1", "secret": "", "mark_key": ""}'):
        context = {"run_id": "1", "key": "k", "from": "hospital-a", "to": "hospital-b"}
        envelope = seal(
            content, context=context, to=IDENTITIES["hospital-b"].certificate, sender=IDENTITIES["hospital-a"]
        )
        sent = {"context": context, "sender": PEM["hospital-a"], "envelope": envelope}
        assert "envelope of the key" in refused(lambda sent=sent: keys_of("hospital-b").receive(sent))


def test_a_second_key_for_one_run_is_refused_and_the_first_stays(keys_of, tmp_path):
    made, envelopes = keys_of("hospital-a").make(SET, PEM)
    site = keys_of("hospital-b")
    site.receive(envelopes["hospital-b"])
    before = sealed_file(tmp_path, "hospital-b").read_bytes()
    second, others = keys_of("hospital-c").make(SET, PEM)
    assert f"expected {made}, with which this run began, found {second}" in refused(
        lambda: site.receive(others["hospital-b"])
    )
    assert sealed_file(tmp_path, "hospital-b").read_bytes() == before
    assert site.key().id == made
    assert site.receive(envelopes["hospital-b"]) == made


# --- after a restart, and at the end --------------------------------------------------------------------------------


@pytest.fixture
def kept(keys_of) -> SiteKeys:
    """A site that has a key, in a process that has not opened it."""
    _, envelopes = keys_of("hospital-a").make(SET, PEM)
    keys_of("hospital-b").receive(envelopes["hospital-b"])
    keys._open.clear()
    return keys_of("hospital-b")


def test_a_key_is_opened_again_from_its_envelope_in_a_new_process(kept, tmp_path):
    key = kept.key()
    assert json.loads(sealed_file(tmp_path, "hospital-b").read_text())["context"]["key"] == key.id
    keys._open.clear()
    again = kept.key()
    assert again is not key
    assert (again.id, again.secret, again.mark_key) == (key.id, key.secret, key.mark_key)


def test_the_envelope_is_of_no_use_without_the_private_key(kept, tmp_path, keys_of):
    place = sealed_file(tmp_path, "hospital-c")
    place.parent.mkdir(parents=True)
    shutil.copy(sealed_file(tmp_path, "hospital-b"), place)
    assert "envelope of the key" in refused(keys_of("hospital-c").key)


def test_a_run_of_the_same_name_does_not_find_the_key_of_the_one_before(kept, keys_of):
    kept.key()
    assert "envelope of the key" in refused(keys_of("hospital-b", run_id="2").key)


def change(**values: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | values).encode()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[]",
    "no envelope": change(envelope=None),
    "no text": change(envelope={"wrapped": 1, "nonce": 2, "sealed": 3, "signature": 4}),
    "no certificate": change(sender=""),
    "no context": change(context=[]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_key_file_is_refused_with_a_reason_and_not_replaced(kept, tmp_path, damage: str):
    file = sealed_file(tmp_path, "hospital-b")
    damaged = DAMAGE[damage](file.read_bytes())
    file.write_bytes(damaged)
    with pytest.raises(NNUNetFlareError) as error:
        kept.key()
    assert error.value.remedy
    assert file.read_bytes() == damaged
    assert keys._open == {}


def test_a_destroyed_key_is_nowhere(kept, tmp_path):
    kept.key()
    kept.saw({"a": 3})
    kept.destroy()
    assert not kept.has_key
    assert not sealed_file(tmp_path, "hospital-b").parent.exists()
    assert keys._open == {}
    assert "found none" in refused(kept.key)
    assert kept.newest_round("a") == -1
    kept.destroy()  # again, as after a restart


def test_the_newest_sum_that_was_seen_is_remembered_for_each_vector_across_processes(kept, keys_of):
    assert kept.newest_round("a") == -1
    kept.saw({"a": 0})
    kept.saw({"a": 4, "b": 2})
    kept.saw({"b": 3})
    later = keys_of("hospital-b")
    assert [later.newest_round(scope) for scope in ("a", "b", "c")] == [4, 3, -1]
