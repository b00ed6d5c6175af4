"""Encrypted vectors: what is decrypted is the mean, and nothing else is decrypted."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_flare.encryption.bfv import record_bytes
from nnunet_flare.encryption.key import AggregationKey
from nnunet_flare.encryption.parameters import PARAMETERS, Parameters
from nnunet_flare.encryption.vector import (
    CHUNK_CIPHERTEXTS,
    EncryptedSum,
    EncryptedVector,
    VectorLayout,
    decrypt_vector,
    encrypt_vector,
)
from nnunet_flare.errors import ConfigError, DecryptionError, EncryptionError

SITES = ("a", "b", "c")
LAYOUT = VectorLayout(scope="run/0/g", shapes={"w": (90, 100), "b": (3,)}, weights={"a": 1, "b": 2, "c": 5})
ROUND = 4


@functools.cache
def key_for(number: int) -> AggregationKey:
    return AggregationKey.new(Parameters.for_sites(number))


def layers_of(site: str, layout: VectorLayout = LAYOUT) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(list(site.encode()))
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in layout.shapes.items()}


def vector_of(site: str, layout: VectorLayout = LAYOUT, *, round_number: int = ROUND, **options) -> EncryptedVector:
    key = options.get("key", key_for(3))
    return encrypt_vector(layers_of(site, layout), layout, key, site=site, round_number=round_number)[0]


def server(
    layout: VectorLayout = LAYOUT, *, round_number: int = ROUND, key: AggregationKey | None = None
) -> EncryptedSum:
    key = key or key_for(3)
    return EncryptedSum(layout, key_id=key.id, parameters=key.parameters, round_number=round_number)


def sum_of(*sites: str, layout: VectorLayout = LAYOUT, round_number: int = ROUND) -> EncryptedVector:
    total = server(layout, round_number=round_number)
    for site in sites:
        total.add(vector_of(site, layout, round_number=round_number), site=site)
    return total.result()


def opened(vector: EncryptedVector, layout: VectorLayout = LAYOUT, **options) -> dict[str, np.ndarray]:
    copy = with_chunks(vector, *vector.chunks)  # decrypting takes the chunks out
    return decrypt_vector(copy, layout, key_for(3), **{"round_number": ROUND, "least_sites": 2} | options)


@settings(max_examples=40)
@given(data=st.data())
def test_the_decrypted_mean_is_within_its_bound_of_the_true_one(data: st.DataObject):
    number = data.draw(st.integers(2, 95))
    shape = data.draw(
        st.sampled_from([(), (1,), (8190,), (8191,), (3, 5, 7), (20_000,)] if number < 10 else [(), (65,)])
    )
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=number, max_size=number))
    max_abs = data.draw(st.sampled_from([4.0, 8.0]))
    sites = [f"site-{index}" for index in range(number)]
    key = key_for(number)
    layout = VectorLayout(
        scope="s", shapes={"w": shape}, weights=dict(zip(sites, weights, strict=True)), max_abs=max_abs
    )
    responding = data.draw(st.lists(st.sampled_from(sites), min_size=2, unique=True))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    total = server(layout, key=key)
    values = {site: rng.uniform(-3.9, 3.9, shape).astype(np.float32) for site in responding}
    for site in responding:
        vector, cost = encrypt_vector({"w": values[site]}, layout, key, site=site, round_number=ROUND)
        assert cost.num_clipped == 0
        total.add(EncryptedVector.from_arrays(vector.to_arrays()), site=site)
    mean = decrypt_vector(total.result(), layout, key, round_number=ROUND, least_sites=2)["w"]
    shares = [layout.weights[site] for site in responding]
    truth = np.average([values[site].astype(np.float64) for site in responding], axis=0, weights=shares)
    step = layout.fixed_point(key.parameters).step
    bound = len(responding) * step / 2 * sum(weights) / sum(shares)
    assert mean.shape == shape
    assert np.abs(mean - truth).max() <= bound * (1 + 1e-6) + 4 * np.finfo(np.float32).eps


@pytest.mark.parametrize("number", [23, 95])
def test_the_largest_sums_that_are_allowed_are_decrypted_exactly(number: int):
    key, sites = key_for(number), [f"s{index}" for index in range(number)]
    layout = VectorLayout(scope="s", shapes={"w": (8190,)}, weights=dict.fromkeys(sites, 1))
    assert key.parameters == (PARAMETERS["bfv-4096-60-50"] if number == 23 else PARAMETERS["bfv-4096-60-48"])
    total = server(layout, key=key)
    for site in sites:
        values = np.where(np.arange(8190) % 2, np.float32(9), np.float32(-9))  # clipped: the fields are full
        vector, cost = encrypt_vector({"w": values}, layout, key, site=site, round_number=ROUND)
        assert cost.num_clipped == 8190
        total.add(vector, site=site)
    mean = decrypt_vector(total.result(), layout, key, round_number=ROUND, least_sites=3)["w"]
    assert np.abs(np.abs(mean) - 4).max() < 1e-4
    assert (np.sign(mean) == np.where(np.arange(8190) % 2, 1, -1)).all()


def test_more_sites_than_the_parameters_bear_are_refused():
    assert Parameters.for_sites(95).max_sites == 95
    with pytest.raises(ConfigError, match="95 sites at most"):
        Parameters.for_sites(96)


def test_counts_are_summed_exactly():
    layout = VectorLayout(scope="s", shapes={"counts": (9000,)}, weights=dict.fromkeys(SITES, 1), max_abs=None)
    counts = {site: np.random.default_rng(index).integers(0, 2**16, 9000) for index, site in enumerate(SITES)}
    total = server(layout)
    for site, values in counts.items():
        layers = {"counts": values.astype(np.float64)}
        total.add(encrypt_vector(layers, layout, key_for(3), site=site, round_number=ROUND)[0], site=site)
    assert (opened(total.result(), layout)["counts"] == sum(counts.values())).all()


def test_a_vector_and_a_sum_take_hardly_more_bytes_than_their_values():
    layout = dataclasses.replace(LAYOUT, shapes={"w": (8190 * CHUNK_CIPHERTEXTS,)})
    size = sum(chunk.nbytes for chunk in vector_of("a", layout).chunks)
    assert size / (4 * layout.size) < 1.005
    assert record_bytes(23) / (4 * 8190) < 1.05
    assert record_bytes(95) / (4 * 8190) < 1.19


def test_layers_are_taken_while_they_are_encrypted_and_others_stay():
    layers = {**layers_of("a"), "other": np.zeros(2, np.float32)}
    encrypt_vector(layers, LAYOUT, key_for(3), site="a", round_number=ROUND)
    assert set(layers) == {"other"}


def test_clipping_is_counted_and_rounding_reported():
    layers = {"w": np.full((90, 100), 0.1, np.float32), "b": np.float32([5, -5, 0])}
    _, cost = encrypt_vector(layers, LAYOUT, key_for(3), site="c", round_number=ROUND)
    step = LAYOUT.fixed_point(key_for(3).parameters).step
    assert cost.num_clipped == 2
    assert 0 < cost.largest_error <= step / 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_not_encrypted(value: float):
    layers = layers_of("a")
    layers["w"][3, 4] = value
    with pytest.raises(EncryptionError, match="a: layer w: expected finite values"):
        encrypt_vector(layers, LAYOUT, key_for(3), site="a", round_number=ROUND)
    assert set(layers) == {"w", "b"}


def test_a_key_survives_its_envelope_and_shows_itself_nowhere():
    key = key_for(3)
    again = AggregationKey.from_bytes(key.to_bytes())
    assert opened(sum_of("a", "b", "c"))["b"].tolist() == (
        decrypt_vector(sum_of("a", "b", "c"), LAYOUT, again, round_number=ROUND, least_sites=2)["b"].tolist()
    )
    assert "secret" not in repr(key)
    assert "mark_key" not in repr(key)


# --- what the server refuses ----------------------------------------------------------------------------------------


def changed(vector: EncryptedVector, **header) -> EncryptedVector:
    return dataclasses.replace(vector, header=dataclasses.replace(vector.header, **header))


def with_chunks(vector: EncryptedVector, *chunks: np.ndarray) -> EncryptedVector:
    return dataclasses.replace(vector, chunks=list(chunks))


REFUSED = {
    "another key": (lambda v: changed(v, key="0" * 32), "key of the vector"),
    "another round": (lambda v: changed(v, round=ROUND - 1), "round of the vector"),
    "another layout": (lambda v: changed(v, layout="0" * 64), "layout of the vector"),
    "another parameter set": (lambda v: changed(v, parameters="bfv-4096-60-48"), "parameters of the vector"),
    "another site's": (lambda v: changed(v, sites=("b",)), "sites of the vector"),
    "a truncated chunk": (lambda v: with_chunks(v, v.chunks[0][:-1]), "chunk 0 of the vector"),
    "a shortened ciphertext": (lambda v: with_chunks(v, v.chunks[0][:, :-8]), "chunk 0 of the vector"),
    "a chunk too many": (lambda v: with_chunks(v, *v.chunks, v.chunks[0]), "chunks of the vector"),
    "no chunk": (lambda v: with_chunks(v), "chunks of the vector"),
    "bytes that are no ciphertext": (
        lambda v: with_chunks(v, np.full_like(v.chunks[0], 0xFF)),
        "expected ciphertexts, found bytes that are none",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_site_that_sends_something_else_is_refused_and_the_sum_stays(fault: str):
    tamper, reason = REFUSED[fault]
    total = server()
    total.add(vector_of("b"), site="b")
    with pytest.raises(EncryptionError, match=reason) as refusal:
        total.add(tamper(vector_of("a")), site="a")
    assert refusal.value.site == "a"
    total.add(vector_of("a"), site="a")
    mean = opened(total.result())["w"]
    expected = (layers_of("a")["w"].astype(np.float64) + 2 * layers_of("b")["w"]) / 3
    assert np.abs(mean - expected).max() < 1e-5


def test_a_site_is_added_once():
    total = server()
    total.add(vector_of("a"), site="a")
    with pytest.raises(EncryptionError, match="a: vector: expected one from each site"):
        total.add(vector_of("a"), site="a")


def arrays_of(vector: EncryptedVector) -> dict[str, np.ndarray]:
    return vector.to_arrays()


FOREIGN = {
    "no header": lambda arrays: arrays.pop("header"),
    "a chunk under another name": lambda arrays: arrays.update(more=arrays.pop("00000")),
    "numbers for bytes": lambda arrays: arrays.update({"00000": arrays["00000"].astype(np.float32)}),
    "a header that is no JSON": lambda arrays: arrays.update(header=np.zeros(4, np.uint8)),
    "a header of another version": lambda arrays: arrays.update(
        header=np.frombuffer(json.dumps({"sites": ["a"], "more": 1}).encode(), np.uint8)
    ),
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_arrays_that_are_no_vector_are_refused(fault: str):
    arrays = dict(vector_of("a").to_arrays())
    FOREIGN[fault](arrays)
    with pytest.raises(EncryptionError, match="a: encrypted layers: expected a header and chunks of bytes"):
        EncryptedVector.from_arrays(arrays, site="a")


# --- what a site refuses, with its key whole ------------------------------------------------------------------------

BAD_SUMS = REFUSED | {
    "another site's": (lambda v: changed(v, sites=("a", "b", "z")), "sites in the sum"),
    "one site twice in its header": (lambda v: changed(v, sites=("a", "a", "b")), "sites in the sum"),
    "too few sites": (lambda v: changed(v, sites=("a",)), "sites in the sum"),
}


@pytest.mark.parametrize("fault", BAD_SUMS)
def test_a_sum_that_is_not_what_was_asked_for_is_refused_before_it_is_decrypted(fault: str):
    tamper, reason = BAD_SUMS[fault]
    with pytest.raises(EncryptionError, match=reason) as refusal:
        opened(tamper(sum_of("a", "b", "c")))
    assert refusal.value.site == "server"


def test_a_sum_of_fewer_sites_than_allowed_is_not_decrypted():
    with pytest.raises(EncryptionError, match="at least 3 different sites"):
        opened(sum_of("a", "b"), least_sites=3)


def test_one_sites_vector_alone_is_never_decrypted():
    with pytest.raises(EncryptionError, match="at least 2 different sites"):
        opened(vector_of("a"), least_sites=1)


# --- what shows only when it is decrypted: the key is lost then -----------------------------------------------------


def forged(**changes) -> EncryptedSum:
    """A server that adds whatever it likes: its checks are switched off."""
    total = server(**changes)
    total.check = lambda vector, *, site: None
    return total


def sum_with(*vectors: tuple[str, EncryptedVector], claims: tuple[str, ...] = SITES) -> EncryptedVector:
    total = forged()
    for site, vector in vectors:
        total.add(vector, site=site)
    return changed(total.result(), sites=claims)


LONG = dataclasses.replace(LAYOUT, shapes={"w": (3 * 8190,)})


def reordered(vector: EncryptedVector) -> EncryptedVector:
    return with_chunks(vector, vector.chunks[0][::-1])


def duplicated(vector: EncryptedVector) -> EncryptedVector:
    return with_chunks(vector, vector.chunks[0][[0, 0, 2]])


def bit_flipped(vector: EncryptedVector) -> EncryptedVector:
    chunk = vector.chunks[0].copy()
    chunk[1, 8 * 1234 + 6] ^= 1  # bit 48 of a coefficient; the lowest bits are noise, and change nothing
    return with_chunks(vector, chunk)


@pytest.mark.parametrize("tamper", [reordered, duplicated, bit_flipped])
def test_ciphertexts_that_were_moved_or_changed_fail_the_validation(tamper):
    vector = sum_of("a", "b", "c", layout=LONG)
    assert opened(vector, LONG)["w"].shape == (3 * 8190,)
    with pytest.raises(DecryptionError, match="key is destroyed"):
        opened(tamper(vector), LONG)


def test_a_server_that_adds_one_site_twice_is_found_out():
    a, b = ("a", vector_of("a")), ("b", vector_of("b"))
    with pytest.raises(DecryptionError, match="marks of a, b, c"):
        opened(sum_with(a, a, b))


def test_a_server_that_drops_a_site_it_names_is_found_out():
    short = sum_with(("a", vector_of("a")), ("b", vector_of("b")))
    with pytest.raises(EncryptionError, match="chunk 0 of the vector"):
        opened(short)
    seeds = np.random.default_rng(0).integers(0, 256, (2, 64), np.uint8)
    with pytest.raises(DecryptionError, match="marks of a, b, c"):
        opened(with_chunks(short, np.hstack([short.chunks[0], seeds])))


def test_a_server_that_replays_a_vector_of_another_round_is_found_out():
    old = ("c", vector_of("c", round_number=ROUND - 1))
    with pytest.raises(DecryptionError, match="marks"):
        opened(sum_with(("a", vector_of("a")), ("b", vector_of("b")), old))


def test_a_server_that_passes_an_old_sum_for_a_new_one_is_found_out():
    with pytest.raises(DecryptionError, match="marks"):
        opened(changed(sum_of(*SITES, round_number=ROUND - 1), round=ROUND))


def test_a_server_that_tells_sites_unlike_layouts_is_found_out():
    swapped = dataclasses.replace(LAYOUT, weights={"a": 5, "b": 2, "c": 1})
    vector = changed(sum_of(*SITES), layout=swapped.digest)
    with pytest.raises(DecryptionError, match="marks"):
        opened(vector, swapped)


def test_a_value_out_of_range_fails_the_validation():
    from nnunet_flare.encryption import vector as module

    fields = np.zeros(8190, np.int64)
    fields[7] = 2**24 - 1  # a field, but beyond what three sites' values can add up to
    key, layout = key_for(3), dataclasses.replace(LAYOUT, shapes={"w": (8190,)})
    total = forged(layout=layout)
    for site in SITES:
        header = module.VectorHeader(
            parameters=key.parameters.id, key=key.id, layout=layout.digest, round=ROUND, sites=(site,)
        )
        mark = int(key.marks(header.label(site), 1)[0])
        record = key.cipher.encrypt(fields if site == "a" else np.zeros(8190, np.int64), mark)
        total.add(EncryptedVector(header=header, chunks=[record[None]]), site=site)
    with pytest.raises(DecryptionError, match="expected values in range"):
        opened(total.result(), layout)
