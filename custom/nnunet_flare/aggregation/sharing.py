"""Which layers which sites share: the sets that asymmetric federated averaging takes its means over.

Layers are matched in blocks (a convolution with its bias and its norm): the same canonical name, shapes and meaning.
``common`` shares the blocks that all sites hold (Skorupko et al., Scientific Reports 15:38312, 2025, eqs. 1 to 4,
Algorithm 1: C(S)); ``cohort`` shares every block within each group of sites that hold it (eq. 3's K_l).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from nnunet_flare.aggregation.network import (
    KINDS,
    Layer,
    Network,
    block_of,
    blocks_of,
    check_same_network,
    network_from_json,
    network_to_json,
)
from nnunet_flare.errors import ConfigError, LayerMismatchError, ParticipationError

__all__ = ["SharedBlock", "Sharing", "SharingConfig"]


@dataclass(frozen=True, kw_only=True)
class SharingConfig:
    """What the sites share.

    Args:
        sharing: ``common`` averages the layers that all sites hold, ``cohort`` every layer within each group of
            sites that hold it.
        alignment: ``name`` matches layers by nnU-Net's own names, which count decoder stages from the bottom;
            ``resolution`` names them by the encoder level that they meet.
        keep_local: Kinds of layers (``norm``, ``head``, ``bias``) and regular expressions, searched for in layer
            names, of layers that stay at their site.
        min_cohort: Least number of sites in a group, and of its replies in a round; with fewer, the group's layers
            keep their values in that round.
        min_overlap: Least share of its parameters that each site must share with others, 0 to 1.

    Raises:
        ConfigError: a value is none of these.
    """

    sharing: str = "common"
    alignment: str = "resolution"
    keep_local: Sequence[str] = ()
    min_cohort: int = 2
    min_overlap: float = 0.1

    def __post_init__(self) -> None:
        for name, allowed in (("sharing", ("common", "cohort")), ("alignment", ("name", "resolution"))):
            if getattr(self, name) not in allowed:
                raise _config_error(name, f"one of {', '.join(allowed)}", repr(getattr(self, name)))
        least = 2 if self.sharing == "cohort" else 1  # a layer that one site holds does not leave it
        if type(self.min_cohort) is not int or self.min_cohort < least:
            raise _config_error("min_cohort", f"an integer from {least} on", repr(self.min_cohort))
        if type(self.min_overlap) not in (int, float) or not 0 <= self.min_overlap <= 1:
            raise _config_error("min_overlap", "a number from 0 to 1", repr(self.min_overlap))
        if isinstance(self.keep_local, str) or not all(isinstance(item, str) and item for item in self.keep_local):
            raise _config_error("keep_local", "a list of kinds and regular expressions", repr(self.keep_local))
        for pattern in self.keep_local:
            try:
                re.compile(pattern)
            except re.error as error:
                raise _config_error("keep_local", "regular expressions", f"{pattern!r} ({error})") from error

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SharingConfig:
        """Raises ConfigError for a setting that does not exist."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise _config_error("sharing settings", f"settings among {', '.join(sorted(known))}", ", ".join(unknown))
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"keep_local": list(self.keep_local)}

    def changes(self) -> dict[str, Any]:
        """The settings that differ from the defaults: what a job file states."""
        default = SharingConfig().to_json()
        return {name: value for name, value in self.to_json().items() if value != default[name]}

    def local_layers(self, networks: Mapping[str, Network]) -> set[str]:
        """Names of the layers that stay local by ``keep_local``.

        Raises:
            ConfigError: a kind or a regular expression that no layer of any site fits.
        """
        layers = {(name, layer.kind) for network in networks.values() for name, layer in network.items()}
        local: set[str] = set()
        for item in self.keep_local:
            found = {name for name, kind in layers if (kind == item if item in KINDS else re.search(item, name))}
            if not found:
                raise _config_error(
                    "keep_local", "kinds and patterns of layers that exist", f"{item!r}, which fits none"
                )
            local |= found
        return local


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedBlock:
    """Layers that belong together, and the sites that hold them alike, in alphabetical order.

    Args:
        layers: All layers of the block.
        local: Names of those that stay local all the same.
        sites: Who shares the block.
        variant: Tells blocks of one name apart: 0 is the one with most sites.
    """

    layers: Network
    local: frozenset[str]
    sites: tuple[str, ...]
    variant: int = 0

    def server_names(self) -> dict[str, str]:
        """Layer name -> the name of its value at the server, for every layer that travels."""
        mark = f"@{self.variant}" if self.variant else ""
        return {name: f"{name}{mark}" for name in self.layers if name not in self.local}


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Who shares what, fixed when a run starts.

    Args:
        networks: Site -> its network.
        blocks: What is shared.
    """

    networks: Mapping[str, Network]
    blocks: tuple[SharedBlock, ...] = field(repr=False)

    @classmethod
    def among(cls, networks: Mapping[str, Network], config: SharingConfig) -> Sharing:
        """Match the sites' networks.

        Raises:
            ConfigError: ``keep_local`` names layers that nobody has.
            LayerMismatchError: a site shares less than ``min_overlap`` of its parameters, or nothing.
        """
        local = config.local_layers(networks)
        holders: dict[str, dict[tuple[tuple[str, Layer], ...], list[str]]] = {}
        for site in sorted(networks):
            for block, layers in blocks_of(networks[site]).items():
                holders.setdefault(block, {}).setdefault(tuple(layers.items()), []).append(site)
        least = len(networks) if config.sharing == "common" else config.min_cohort
        shared = []
        for variants in holders.values():
            cohorts = sorted(variants.items(), key=lambda item: (-len(item[1]), item[1]))
            for variant, (alike, sites) in enumerate(cohorts):
                if len(sites) >= least:
                    layers = dict(alike)
                    kept = frozenset(local & layers.keys())
                    shared.append(SharedBlock(layers=layers, local=kept, sites=tuple(sites), variant=variant))
        sharing = cls(networks=networks, blocks=tuple(shared))
        sharing._check_overlap(config.min_overlap)
        return sharing

    def joined_by(self, networks: Mapping[str, Network], config: SharingConfig) -> Sharing:
        """This sharing with more sites: each joins the blocks that it holds; nothing else changes.

        Raises:
            LayerMismatchError: a site that took part before has another network now, or a new one does not hold the
                layers common to all, or shares less than ``min_overlap``.
        """
        for site in sorted(networks.keys() & self.networks.keys()):
            check_same_network(
                site,
                networks[site],
                self.networks[site],
                origin="when the run started",
                remedy="restore the site's plans and data set, or start a run of another name",
            )
        new = {site: blocks_of(networks[site]) for site in sorted(networks.keys() - self.networks.keys())}
        if not new:
            return self
        blocks = []
        for block in self.blocks:
            name = block_of(next(iter(block.layers)))
            joining = [site for site in new if new[site].get(name) == block.layers]
            if config.sharing == "common" and len(joining) < len(new):
                site = min(new.keys() - set(joining))
                raise _mismatch(
                    f"layers {name}", "the layers that all sites of this run hold", "others", "plan as they do", site
                )
            blocks.append(replace(block, sites=tuple(sorted({*block.sites, *joining}))))
        sharing = Sharing(networks={**self.networks, **networks}, blocks=tuple(blocks))
        sharing._check_overlap(config.min_overlap)
        return sharing

    def names_of(self, site: str) -> dict[str, str]:
        """Layer name at ``site`` -> name of its value at the server, for every layer that the site shares."""
        return {name: key for block in self._blocks_of(site) for name, key in block.server_names().items()}

    def sizes(self) -> dict[str, int]:
        """Server's name of each layer that travels -> number of its values."""
        return {key: block.layers[name].size for block in self.blocks for name, key in block.server_names().items()}

    def donors(self, present: Collection[str]) -> dict[str, dict[str, str]]:
        """Site -> (layer name -> server's name) of the layers whose initial values its architecture gives.

        Args:
            present: Sites to choose from.

        Raises:
            ParticipationError: none of them holds some layer; names the sites that do.
        """
        found: dict[str, dict[str, str]] = {}
        for block in self.blocks:
            holders = [site for site in block.sites if site in present]
            if not holders:
                raise ParticipationError(
                    field=f"layers {block_of(next(iter(block.layers)))}",
                    expected=f"one of {', '.join(block.sites)}, which hold them",
                    found="none of these sites",
                    remedy="submit the job again when one of them is connected",
                )
            found.setdefault(holders[0], {}).update(block.server_names())
        return {site: keys for site, keys in found.items() if keys}

    def is_complete(self, site: str) -> bool:
        """True if no layer of the site is local."""
        return self.names_of(site).keys() == self.networks[site].keys()

    def coverage(self) -> dict[str, Any]:
        """JSON values, per site: number of parameters, the share of them that travels, and that each other site has."""
        report = {}
        for site, network in self.networks.items():
            total = sum(layer.size for layer in network.values())
            sizes = {
                block: sum(block.layers[name].size for name in block.server_names()) for block in self._blocks_of(site)
            }
            report[site] = {
                "parameters": total,
                "shared": sum(sizes.values()) / total,
                "shared_with": {
                    other: sum(size for block, size in sizes.items() if other in block.sites) / total
                    for other in self.networks
                    if other != site
                },
            }
        return report

    def _blocks_of(self, site: str) -> list[SharedBlock]:
        return [block for block in self.blocks if site in block.sites]

    def _check_overlap(self, least: float) -> None:
        shares = {site: covered["shared"] for site, covered in self.coverage().items()}
        site = min(shares, key=lambda name: shares[name])
        if shares[site] == 0 or shares[site] < least:
            raise _mismatch(
                "shared layers",
                f"at least {least:.0%} of each site's parameters, and more than none",
                ", ".join(f"{share:.1%} at {name}" for name, share in shares.items()),
                "align by resolution, share by cohort, give the sites nearer plans, or lower min_overlap",
                site,
            )

    def to_json(self) -> dict[str, Any]:
        networks = {site: network_to_json(network) for site, network in self.networks.items()}
        blocks = [
            {"names": list(b.layers), "local": sorted(b.local), "sites": list(b.sites), "variant": b.variant}
            for b in self.blocks
        ]
        return {"networks": networks, "blocks": blocks}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sharing:
        networks = {site: network_from_json(layers) for site, layers in values["networks"].items()}
        blocks = tuple(
            SharedBlock(
                layers={name: networks[block["sites"][0]][name] for name in block["names"]},
                local=frozenset(block["local"]),
                sites=tuple(block["sites"]),
                variant=block["variant"],
            )
            for block in values["blocks"]
        )
        return cls(networks=networks, blocks=blocks)


def _mismatch(field_name: str, expected: str, found: str, remedy: str, site: str) -> LayerMismatchError:
    return LayerMismatchError(field=field_name, expected=expected, found=found, remedy=remedy, site=site)


def _config_error(name: str, expected: str, found: str) -> ConfigError:
    return ConfigError(field=name, expected=expected, found=found, remedy="correct the job's sharing settings")
