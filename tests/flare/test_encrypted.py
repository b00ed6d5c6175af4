"""Encrypted jobs, controller and executors and filters in one process (``loopback``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes

from conftest import TINY_TRAINING, settings_of
from loopback import Loopback
from nnunet_flare.encryption.parameters import Parameters
from nnunet_flare.flare import filters, keys
from nnunet_flare.flare.asym import AsymFedAvgController
from nnunet_flare.flare.controller import FederatedTraining
from nnunet_flare.flare.encrypted import EncryptedVectors
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.flare.identity import throw_away_identity
from nnunet_flare.flare.protocol import TRAIN
from nnunet_flare.flare.run import read_arrays
from nnunet_flare.nnunet.model import read_weights
from nnunet_flare.nnunet.phantoms import write_demo_dataset
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.storage import read_json

pytestmark = pytest.mark.usefixtures("inline")

SITES = ("site-1", "site-2", "site-3")
ENCRYPTION: dict[str, Any] = {}
NARROW = {"batch_size": 2, "architecture.arch_kwargs.features_per_stage": [8, 16, 32, 64]}
TINY = TINY_TRAINING | {"plans_overrides": NARROW}
ONE_ROUND = TINY | {"num_rounds": 1}
UP_TO_PLAN = ONE_ROUND | {"stop_after": "plan"}
MIXED = TINY_TRAINING | {"dataset": "Dataset902_DemoMixed", "configuration": "3d_fullres", "num_rounds": 1}
STEP = 2.0**-22


def final_weights(home: Path, site: str, run: str) -> dict[str, np.ndarray]:
    (file,) = (home / site / "runs" / run / "nnUNet_results").rglob("checkpoint_final.pth")
    return {name: value.numpy() for name, value in read_weights(file).items()}


def pin_each_other(home: Path, folder: Path, sites: tuple[str, ...]) -> None:
    """Each site's settings name the certificates of the others, and nobody else's."""
    pins = {
        site: throw_away_identity(SiteSettings(site=site, home=home)).certificate.fingerprint(hashes.SHA256()).hex()
        for site in sites
    }
    for site in sites:
        settings_of(site, folder, peers={name: pin for name, pin in pins.items() if name != site})


def newest_state(home: Path, run: str) -> dict[str, np.ndarray]:
    return read_arrays(sorted((home / "server" / "runs" / run / "state").iterdir())[-1])


def test_an_encrypted_round_gives_the_plain_mean_and_the_server_keeps_ciphertexts_alone(
    demo_home: Path, tmp_path: Path
):
    federation = Loopback(tmp_path, SITES)
    federation.run("plain", ONE_ROUND)
    assert federation.panics == []
    federation.run("secret", ONE_ROUND, encryption=ENCRYPTION)
    assert federation.panics == []
    plain, secret = (final_weights(demo_home, "site-2", run) for run in ("plain", "secret"))
    assert plain.keys() == secret.keys()
    largest = max(float(np.abs(plain[name] - secret[name]).max()) for name in plain)
    assert 0 < largest <= len(SITES) * STEP / 2 + 1e-7
    state = newest_state(demo_home, "secret")
    assert {array.dtype for array in state.values()} == {np.dtype(np.uint8)}
    server = demo_home / "server" / "runs" / "secret"
    assert not (server / "model").exists()
    assert not (server / "dataset_fingerprint.json").exists()
    history = RunHistory.load(server)
    assert history.phase == "done"
    assert all(0 < site.quantisation_error <= STEP / 2 for site in history.rounds[0].sites.values())
    assert all(site.num_clipped == 0 for site in history.rounds[0].sites.values())


def test_in_every_round_each_site_opens_the_mean_of_what_the_sites_trained(
    demo_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encrypt, decrypt, sent, received = filters.encrypt_vector, filters.decrypt_vector, {}, {}

    def noted(layers, layout, key, *, site, round_number):
        sent[round_number, site] = ({name: array.copy() for name, array in layers.items()}, layout.weights)
        return encrypt(layers, layout, key, site=site, round_number=round_number)

    def opened(vector, layout, key, *, round_number, least_sites):
        layers = decrypt(vector, layout, key, round_number=round_number, least_sites=least_sites)
        received.setdefault(round_number, []).append(layers)
        return layers

    monkeypatch.setattr(filters, "encrypt_vector", noted)
    monkeypatch.setattr(filters, "decrypt_vector", opened)
    federation = Loopback(tmp_path, SITES)
    (demo_home / "site-3" / "nnUNet_raw" / "Dataset900_Demo").rename(tmp_path / "whole")
    write_demo_dataset(demo_home / "site-3" / "nnUNet_raw", "site-3", num_cases=10)  # another weight than the others'
    plans = demo_home / "server" / "runs" / "rounds" / "encryption.json"
    federation.run("rounds", TINY | {"num_rounds": 2}, encryption=ENCRYPTION)
    assert federation.panics == []
    assert read_json(plans)["parameters"] == "bfv-4096-60-50"
    weights = sent[1, "site-1"][1]
    assert weights["site-3"] > weights["site-1"]
    for round_number in (0, 1):
        of_sites = [sent[round_number, site][0] for site in SITES]
        means = received[round_number][-3:]  # the fingerprint's sum counts as round 0, and is opened before
        for name in of_sites[0]:
            values = [layers[name].astype(np.float64) for layers in of_sites]
            truth = np.average(values, axis=0, weights=[weights[site] for site in SITES])
            for mean in means:
                assert np.abs(mean[name] - truth).max() <= len(SITES) * STEP / 2 + 1e-7


def test_every_key_is_destroyed_when_the_run_is_over(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    federation.run("over", UP_TO_PLAN, encryption=ENCRYPTION)
    sealed = [demo_home / site / "runs" / "over" / "encryption" / "key.json" for site in SITES]
    assert all(file.exists() for file in sealed)
    federation.run("over", ONE_ROUND, encryption=ENCRYPTION)
    assert federation.panics == []
    assert not any(file.exists() for file in sealed)
    assert not [place for place in keys._open if place[0].parent.name == "over"]


@pytest.mark.slow
def test_keys_are_destroyed_by_the_next_job_if_the_server_is_lost_before(
    demo_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    federation = Loopback(tmp_path, SITES)
    with monkeypatch.context() as patch:
        patch.setattr(FederatedTraining, "_forget_keys", lambda self: 1 / 0)
        federation.run("nearly", ONE_ROUND, encryption=ENCRYPTION)
    sealed = [demo_home / site / "runs" / "nearly" / "encryption" / "key.json" for site in SITES]
    assert all(file.exists() for file in sealed)
    federation.run("nearly", ONE_ROUND, encryption=ENCRYPTION)
    assert federation.panics == []
    assert not any(file.exists() for file in sealed)
    assert not list((demo_home / "server" / "runs").glob("archive/nearly-*"))


@pytest.mark.slow
def test_a_run_goes_on_with_its_key_after_every_process_is_gone(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    federation.run("again", TINY | {"num_rounds": 2}, encryption=ENCRYPTION)
    assert federation.panics == []
    calls = []

    def fail_in_round_two(site, task, reply):
        calls.append(task)
        return None if task == TRAIN and calls.count(TRAIN) > 3 else reply

    federation.tamper = fail_in_round_two
    federation.run("broken", TINY | {"num_rounds": 2}, encryption=ENCRYPTION)
    assert "updates in round 2" in federation.panics[0]
    key = read_json(demo_home / "server" / "runs" / "broken" / "encryption.json")["key"]
    keys._open.clear()
    federation.tamper = lambda site, task, reply: reply
    federation.run("broken", TINY | {"num_rounds": 2}, encryption=ENCRYPTION)
    assert federation.panics == []
    assert read_json(demo_home / "server" / "runs" / "broken" / "encryption.json")["key"] == key
    whole, resumed = (final_weights(demo_home, "site-1", run) for run in ("again", "broken"))
    assert all((whole[name] == resumed[name]).all() for name in whole)


def test_a_site_that_lost_its_envelope_gets_another_from_the_key_holder(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    federation.run("lost", UP_TO_PLAN, encryption=ENCRYPTION)
    (demo_home / "site-3" / "runs" / "lost" / "encryption" / "key.json").unlink()
    keys._open.clear()
    federation.run("lost", UP_TO_PLAN, encryption=ENCRYPTION)
    assert federation.panics == []


def test_a_key_that_is_lost_at_its_holder_ends_the_job_with_the_reason(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    federation.run("lost", UP_TO_PLAN, encryption={"key_holder": "site-2"})
    (demo_home / "site-2" / "runs" / "lost" / "encryption" / "key.json").unlink()
    keys._open.clear()
    federation.run("lost", UP_TO_PLAN, encryption={"key_holder": "site-2"})
    assert federation.panics[0].startswith("site-2: key: expected the key that this run began with, found none")


def test_two_sites_are_too_few_unless_both_allow_it(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES[:2])
    settings_of("site-1", tmp_path, min_sites_in_sum=2)
    federation.run("two", UP_TO_PLAN, encryption=ENCRYPTION)
    assert federation.panics[0].startswith("site-2: sites that train: expected at least 3")
    settings_of("site-2", tmp_path, min_sites_in_sum=2)
    federation.run("two", UP_TO_PLAN, encryption=ENCRYPTION)
    assert federation.panics == []


@pytest.mark.slow
def test_the_mean_is_of_those_who_answered_and_a_site_that_missed_a_round_is_back_in_the_next(
    demo_home: Path, tmp_path: Path
):
    for site in SITES:
        settings_of(site, tmp_path, min_sites_in_sum=2)
    dropped: list[str] = []

    def drop_once(site, task, reply):
        if site == "site-3" and task == TRAIN and not dropped:
            dropped.append(site)
            return None
        return reply

    federation = Loopback(tmp_path, SITES, tamper=drop_once)
    federation.run("missed", TINY | {"num_rounds": 2}, {"min_sites": 2}, encryption=ENCRYPTION)
    assert federation.panics == []
    first, second = RunHistory.load(demo_home / "server" / "runs" / "missed").rounds
    assert set(first.sites) == {"site-1", "site-2"}
    assert set(second.sites) == set(SITES)
    header = next(array for name, array in newest_state(demo_home, "missed").items() if name.endswith("/header"))
    assert json.loads(header.tobytes())["sites"] == list(SITES)


def test_a_round_with_fewer_answers_than_a_sum_needs_ends_the_job(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES, tamper=drop)
    federation.run("short", TINY, {"min_sites": 2}, encryption=ENCRYPTION)
    assert federation.panics[0].startswith("updates in round 1: expected at least 3, found 2")


def drop(site: str, task: str, reply):
    return None if site == "site-1" and task == TRAIN else reply


def test_unlike_networks_share_encrypted_and_each_cohort_is_a_vector_of_its_own(mixed: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    for site in SITES:
        settings_of(site, tmp_path, min_sites_in_sum=2)
    federation.run("mixed", MIXED, sharing={"sharing": "cohort"}, kind=AsymFedAvgController, encryption=ENCRYPTION)
    assert federation.panics == []
    state = newest_state(mixed, "mixed")
    groups = {name.partition("/")[0] for name in state}
    assert {array.dtype for array in state.values()} == {np.dtype(np.uint8)}
    assert len(groups) > 1
    members = [json.loads(state[f"{group}/header"].tobytes())["sites"] for group in groups]
    assert list(SITES) in members
    assert all(len(sites) >= 2 for sites in members)


@pytest.mark.slow
def test_a_cohort_with_too_few_answers_keeps_its_layers_and_the_others_go_on(mixed: Path, tmp_path: Path):
    for site in SITES:
        settings_of(site, tmp_path, min_sites_in_sum=2)
    federation = Loopback(tmp_path, SITES, tamper=drop)
    federation.run(
        "kept",
        MIXED,
        {"min_sites": 2},
        sharing={"sharing": "cohort"},
        kind=AsymFedAvgController,
        encryption=ENCRYPTION,
    )
    assert federation.panics == []
    (record,) = RunHistory.load(mixed / "server" / "runs" / "kept").rounds
    state = newest_state(mixed, "kept")
    plain = [name for name, array in state.items() if array.dtype == np.float32]
    assert record.unchanged_layers == len(plain) > 0
    assert [name for name in state if name.endswith("/header")]


def test_sites_that_pin_each_other_s_certificates_share_a_key(demo_home: Path, tmp_path: Path):
    pin_each_other(demo_home, tmp_path, SITES)
    federation = Loopback(tmp_path, SITES)
    federation.run("pinned", UP_TO_PLAN, encryption=ENCRYPTION)
    assert federation.panics == []


@pytest.mark.parametrize("holder", ["site-1", "site-3"])
def test_a_site_that_the_others_have_not_pinned_gets_no_key_and_gives_none(
    demo_home: Path, tmp_path: Path, holder: str
):
    pin_each_other(demo_home, tmp_path, SITES[:2])
    federation = Loopback(tmp_path, SITES)
    federation.run("unpinned", UP_TO_PLAN, encryption={"key_holder": holder})
    assert "peers: expected one of site-" in federation.panics[0]
    assert "found site-3" in federation.panics[0]
    assert not (demo_home / SITES[1] / "runs" / "unpinned" / "encryption" / "key.json").exists()


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_plain_job_is_refused_by_a_site_whose_policy_demands_encryption(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    federation.policy_filters = {"site-2"}
    federation.run("plain", ONE_ROUND)
    assert federation.panics[0].startswith("site-2: job: expected an encrypted one, as this site's policy says")


def test_the_filters_of_a_job_find_the_work_done_where_a_site_has_its_own(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    federation.policy_filters = set(SITES)
    federation.run("twice", UP_TO_PLAN, encryption=ENCRYPTION)
    assert federation.panics == []


def test_a_tampered_sum_ends_the_job_and_destroys_the_keys_but_no_state(
    demo_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    finish = EncryptedVectors.finish

    def tampered(self, min_sites):
        results = finish(self, min_sites)
        for group, arrays in results.items():
            if group != "fingerprint":
                arrays[f"{group}/00000"][0, 6] ^= 1
        return results

    monkeypatch.setattr(EncryptedVectors, "finish", tampered)
    federation = Loopback(tmp_path, SITES)
    federation.run("tampered", TINY, encryption=ENCRYPTION)
    assert "decrypted sum: expected the marks of site-1, site-2, site-3" in federation.panics[0]
    for site in SITES:
        assert not (demo_home / site / "runs" / "tampered" / "encryption" / "key.json").exists()
        assert list((demo_home / site / "runs" / "tampered" / "checkpoints").rglob("round_00000.pt"))
    assert RunHistory.load(demo_home / "server" / "runs" / "tampered").rounds_done == 1


def test_a_server_that_goes_back_to_an_older_sum_is_refused_and_the_key_stays(
    demo_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    request, told = EncryptedVectors.request, []

    def stale(self, group, values):
        answer = request(self, group, values)
        if group != "fingerprint" and answer[0]["sum"] is not None:
            told.append(answer)
            return told[0] if len(told) > 2 * len(SITES) else answer  # the model that is validated is an old one
        return answer

    monkeypatch.setattr(EncryptedVectors, "request", stale)
    federation = Loopback(tmp_path, SITES)
    federation.run("stale", TINY, encryption=ENCRYPTION)
    assert "site-1: round of the sum: expected 1 or a later one that is over, found 0" in federation.panics[0]
    assert all((demo_home / site / "runs" / "stale" / "encryption" / "key.json").exists() for site in SITES)


def test_encryption_does_not_go_with_models_across_sites_or_half_precision(tmp_path: Path):
    from nnunet_flare.errors import ConfigError
    from nnunet_flare.flare.ffe import FFEController

    with pytest.raises(ConfigError, match="cross_site"):
        FFEController("run", None, {"cross_site": True}, encryption=ENCRYPTION)
    with pytest.raises(ConfigError, match="wire_dtype"):
        FFEController("run", {"wire_dtype": "float16"}, encryption=ENCRYPTION)
    with pytest.raises(ConfigError, match="max_abs_weight"):
        FFEController("run", encryption={"max_abs_weight": 3})
    assert Parameters.for_sites(3).field_bits == 25
