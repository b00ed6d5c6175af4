"""Who shares what, against sets made by hand and against the paper's equations in plain NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_flare.aggregation.network import Layer, block_of, blocks_of, network_from_json
from nnunet_flare.aggregation.sharing import Sharing, SharingConfig
from nnunet_flare.aggregation.weighted_sum import WeightedSum
from nnunet_flare.errors import ConfigError, LayerMismatchError, ParticipationError

SITES_1_2 = ("site-1", "site-2")
BLOCKS = [f"encoder.stages.{stage}.0.convs.0" for stage in range(4)]


def network(widths: dict[str, int], *, labels: str = "a b") -> dict[str, Layer]:
    """A convolution with bias and norm for each block -> width, and a head."""
    layers = {}
    for block, width in widths.items():
        layers[f"{block}.conv.weight"] = Layer(shape=(width, 2))
        layers[f"{block}.conv.bias"] = Layer(shape=(width,), kind="bias")
        layers[f"{block}.norm.weight"] = Layer(shape=(width,), kind="norm")
    return layers | {"decoder.seg_layers.0.weight": Layer(shape=(3, 2), kind="head", meaning=labels)}


def names(sharing: Sharing, site: str) -> set[str]:
    return set(sharing.names_of(site))


ANY_OVERLAP = SharingConfig(min_overlap=0)
NETWORKS = {
    "site-1": network(dict.fromkeys(BLOCKS[:3], 4)),
    "site-2": network(dict.fromkeys(BLOCKS[:2], 4) | {BLOCKS[2]: 8}),
    "site-3": network(dict.fromkeys(BLOCKS[:1], 4) | {BLOCKS[1]: 2, BLOCKS[2]: 8}),
}


def test_common_layers_are_those_of_all_sites():
    sharing = Sharing.among(NETWORKS, ANY_OVERLAP)
    expected = {name for name in NETWORKS["site-1"] if block_of(name) in (BLOCKS[0], "decoder.seg_layers.0")}
    for site in NETWORKS:
        assert names(sharing, site) == expected
        assert not sharing.is_complete(site)


def test_cohorts_of_one_name_are_kept_apart():
    networks = NETWORKS | {"site-4": NETWORKS["site-3"]}
    sharing = Sharing.among(networks, SharingConfig(sharing="cohort", min_overlap=0))
    second = f"{BLOCKS[1]}.conv.weight"
    assert sharing.names_of("site-1")[second] == sharing.names_of("site-2")[second]
    assert sharing.names_of("site-3")[second] == sharing.names_of("site-4")[second]
    assert sharing.names_of("site-1")[second] != sharing.names_of("site-3")[second]
    third = f"{BLOCKS[2]}.conv.weight"
    assert third not in sharing.names_of("site-1")  # held by one site alone: it does not leave it
    assert sharing.names_of("site-2")[third] == sharing.names_of("site-4")[third]


def test_a_block_is_shared_as_a_whole_or_not_at_all():
    odd = network(dict.fromkeys(BLOCKS, 4))
    odd[f"{BLOCKS[1]}.conv.weight"] = Layer(shape=(4, 9))  # another kernel, while bias and norm are alike
    networks = {"site-1": network(dict.fromkeys(BLOCKS, 4)), "site-2": odd}
    shared = names(Sharing.among(networks, ANY_OVERLAP), "site-2")
    assert not any(block_of(name) == BLOCKS[1] for name in shared)


def test_heads_are_shared_only_where_the_labels_agree():
    networks = {
        "site-1": network({BLOCKS[0]: 4}, labels="a b"),
        "site-2": network({BLOCKS[0]: 4}, labels="b a"),
        "site-3": network({BLOCKS[0]: 4}, labels="a b"),
    }
    sharing = Sharing.among(networks, SharingConfig(sharing="cohort"))
    head = "decoder.seg_layers.0.weight"
    assert head in names(sharing, "site-1")
    assert head in names(sharing, "site-3")
    assert head not in names(sharing, "site-2")


@pytest.mark.parametrize(
    ("keep_local", "local"),
    [
        (["norm"], {".norm."}),
        (["head"], {"seg_layers"}),
        (["bias"], {".conv.bias"}),
        ([r"stages\.1\.", "head"], {"stages.1.", "seg_layers"}),
    ],
)
def test_kept_layers_do_not_travel_and_all_others_do(keep_local, local):
    networks = {site: network(dict.fromkeys(BLOCKS, 4)) for site in ("site-1", "site-2")}
    sharing = Sharing.among(networks, SharingConfig(keep_local=keep_local))
    kept = {name for name in networks["site-1"] if any(part in name for part in local)}
    assert kept
    assert names(sharing, "site-1") == networks["site-1"].keys() - kept


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(ConfigError, match="'bottleneck', which fits none"):
        Sharing.among(NETWORKS, SharingConfig(keep_local=["norm", "bottleneck"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"sharing": "all"},
        {"alignment": "depth"},
        {"keep_local": ["("]},
        {"keep_local": "norm"},
        {"min_cohort": 0},
        {"sharing": "cohort", "min_cohort": 1},
        {"min_overlap": 1.5},
        {"min_ovelap": 0.5},
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(ConfigError) as refused:
        SharingConfig.from_json(settings)
    assert list(settings)[-1] in f"{refused.value.field} {refused.value.found}"


def test_settings_survive_json():
    config = SharingConfig(sharing="cohort", keep_local=["norm"], min_overlap=0.3)
    assert SharingConfig.from_json(json.loads(json.dumps(config.to_json()))) == SharingConfig(
        sharing="cohort", keep_local=["norm"], min_overlap=0.3
    )
    assert config.changes() == {"sharing": "cohort", "keep_local": ["norm"], "min_overlap": 0.3}


def test_no_overlap_is_refused_by_site():
    networks = {"site-1": network({BLOCKS[0]: 4}, labels="a"), "site-2": network({BLOCKS[0]: 2}, labels="b")}
    with pytest.raises(LayerMismatchError, match=r"site-1: shared layers: .*found 0\.0%"):
        Sharing.among(networks, ANY_OVERLAP)


def test_too_little_overlap_is_refused_with_both_figures():
    with pytest.raises(LayerMismatchError, match=r"at least 90%.*found 4[0-9]\.[0-9]%"):
        Sharing.among(NETWORKS, SharingConfig(min_overlap=0.9))


def test_coverage_counts_parameters():
    sharing = Sharing.among(NETWORKS, SharingConfig(sharing="cohort", min_overlap=0))
    covered = sharing.coverage()["site-2"]
    sizes = {
        block: sum(layer.size for layer in layers.values()) for block, layers in blocks_of(NETWORKS["site-2"]).items()
    }
    assert covered["parameters"] == sum(sizes.values())
    with_1 = sizes[BLOCKS[0]] + sizes[BLOCKS[1]] + sizes["decoder.seg_layers.0"]
    assert covered["shared_with"]["site-1"] == pytest.approx(with_1 / sum(sizes.values()))
    assert covered["shared"] == 1.0


def test_a_record_brings_back_the_same_sharing():
    sharing = Sharing.among(NETWORKS, SharingConfig(sharing="cohort", min_overlap=0, keep_local=["norm"]))
    again = Sharing.from_json(json.loads(json.dumps(sharing.to_json())))
    assert again.networks == sharing.networks
    for site in NETWORKS:
        assert again.names_of(site) == sharing.names_of(site)
    assert again.coverage() == sharing.coverage()


def test_a_site_that_returns_with_another_network_is_refused():
    sharing = Sharing.among(NETWORKS, ANY_OVERLAP)
    with pytest.raises(LayerMismatchError, match=r"site-2: layer .*as when the run started"):
        sharing.joined_by({"site-2": NETWORKS["site-3"]}, ANY_OVERLAP)


def test_a_new_site_joins_what_it_holds_and_changes_nothing_for_the_others():
    config = SharingConfig(sharing="cohort", min_overlap=0)
    before = Sharing.among(NETWORKS, config)
    after = before.joined_by({"site-4": NETWORKS["site-1"]}, config)
    for site in NETWORKS:
        assert after.names_of(site) == before.names_of(site)
    assert after.names_of("site-4") == before.names_of("site-1")


def test_a_new_site_without_a_common_layer_is_refused():
    sharing = Sharing.among(NETWORKS, ANY_OVERLAP)
    with pytest.raises(LayerMismatchError, match=r"site-4: layers .*all sites of this run"):
        sharing.joined_by({"site-4": network({BLOCKS[1]: 4})}, ANY_OVERLAP)


# --- the paper's equations ----------------------------------------------------------------------------------------

SITES = ("a", "b", "c", "d")


@st.composite
def federations(draw: st.DrawFn):
    """Random architectures with weights: each site holds some of four blocks, each in one of two widths."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    architectures = {}
    for site in SITES[: draw(st.integers(2, 4))]:
        widths = {block: draw(st.sampled_from([0, 2, 3])) for block in BLOCKS}
        architectures[site] = network({block: width for block, width in widths.items() if width})
    values = {
        site: {name: generator.normal(size=layer.shape).astype(np.float32) for name, layer in layers.items()}
        for site, layers in architectures.items()
    }
    weights = {site: draw(st.integers(1, 50)) for site in architectures}
    return architectures, values, weights


def averaged(architectures, values, weights, config):
    """One round as the controller conducts it."""
    sharing = Sharing.among(architectures, config)
    total = WeightedSum(total_weight=sum(weights.values()))
    for site in architectures:
        shared = sharing.names_of(site)
        total.add({key: values[site][name] for name, key in shared.items()}, weight=weights[site])
    mean = total.mean(min_sites=config.min_cohort)
    return {
        site: {
            name: mean[sharing.names_of(site)[name]] if name in names(sharing, site) else values[site][name]
            for name in layers
        }
        for site, layers in architectures.items()
    }


def reference(architectures, values, weights, sharing):
    """Equations 2 to 4 of the paper, layer by layer: a layer is a block, present where all its shapes are."""
    result = {site: dict(layers) for site, layers in values.items()}
    for site, layers in architectures.items():
        for name in layers:
            block = blocks_of(layers)[block_of(name)]
            holders = [other for other in architectures if blocks_of(architectures[other]).get(block_of(name)) == block]
            if len(holders) >= (len(architectures) if sharing == "common" else 2):
                stack = np.stack([values[other][name].astype(np.float64) for other in holders])
                result[site][name] = np.average(stack, axis=0, weights=[weights[other] for other in holders])
    return result


@given(federations(), st.sampled_from(["common", "cohort"]), st.booleans())
def test_a_round_is_the_papers_equations(federation, sharing, by_cases):
    architectures, values, weights = federation
    weights = weights if by_cases else dict.fromkeys(weights, 1)
    ours = averaged(architectures, values, weights, SharingConfig(sharing=sharing, min_overlap=0))
    expected = reference(architectures, values, weights, sharing)
    for site, layers in expected.items():
        for name, value in layers.items():
            np.testing.assert_allclose(ours[site][name], value, rtol=1e-6, atol=1e-7)


@given(federations())
def test_equal_networks_make_it_plain_federated_averaging(federation):
    architectures, values, weights = federation
    first = next(iter(architectures))
    architectures = dict.fromkeys(architectures, architectures[first])
    generator = np.random.default_rng(len(values))
    values = {
        site: {n: generator.normal(size=v.shape).astype(np.float32) for n, v in values[first].items()}
        for site in values
    }
    common, cohort = (
        averaged(architectures, values, weights, SharingConfig(sharing=sharing)) for sharing in ("common", "cohort")
    )
    for name in architectures[first]:
        stack = np.stack([values[site][name] for site in architectures]).astype(np.float64)
        expected = np.average(stack, axis=0, weights=list(weights.values()))
        for site in architectures:
            np.testing.assert_allclose(common[site][name], expected, rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(common[site][name], cohort[site][name])


@given(federations())
def test_two_sites_share_the_same_by_cohort_as_in_common(federation):
    architectures, _, _ = federation
    pair = dict(list(architectures.items())[:2])
    common, cohort = (
        Sharing.among(pair, SharingConfig(sharing=sharing, min_overlap=0)) for sharing in ("common", "cohort")
    )
    for site in pair:
        assert names(common, site) == names(cohort, site)


# --- what a site may send -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        ["w@1", [2], "weight", ""],
        ["w", [-1], "weight", ""],
        ["w", [0], "weight", ""],
        ["w", [2.0], "weight", ""],
        ["w", [2**40], "weight", ""],
        ["w", [2], "convolution", ""],
        ["w\n", [2], "weight", ""],
        ["w", [2], "weight", None],
        [3, [2], "weight", ""],
        ["known", [2], "weight", ""],
    ],
)
def test_a_layer_that_no_network_has_is_refused(entry):
    with pytest.raises((ValueError, TypeError)):
        network_from_json([["known", [2], "weight", ""], entry])


def test_donors_are_sites_that_are_there():
    sharing = Sharing.among(NETWORKS, SharingConfig(sharing="cohort", min_overlap=0))
    for present in (SITES_1_2, {"site-2", "site-3"}):
        donors = sharing.donors(present)
        assert set(donors) <= set(present)
        assert {key for keys in donors.values() for key in keys.values()} == {
            key for site in NETWORKS for key in sharing.names_of(site).values()
        }
    with pytest.raises(ParticipationError, match="one of site-1, site-2"):
        sharing.donors({"site-3"})
