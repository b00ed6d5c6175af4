"""What sites answer, cast to the types that the controller works with; anything else is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nnunet_flare.aggregation.network import Network, network_from_json
from nnunet_flare.errors import ConfigError, NNUNetFlareError, UpdateError
from nnunet_flare.flare.history import SiteFinal, SiteRound
from nnunet_flare.flare.protocol import Message, layer_bytes
from nnunet_flare.nnunet.metrics import LabelMetrics, mean_metrics
from nnunet_flare.nnunet.network_plan import check_classes, network_plan
from nnunet_flare.nnunet.schema import DatasetSchema
from nnunet_flare.nnunet.site import ROLES

__all__ = [
    "SiteDescription",
    "SiteLayers",
    "SitePlan",
    "cast",
    "check_versions",
    "site_architecture",
    "site_final",
    "site_round",
]

T = TypeVar("T")


def cast(site: str, reply: Message, parse: Callable[[Mapping[str, Any]], T]) -> T:
    """``parse(reply.content)``.

    Raises:
        UpdateError: the content is not what ``parse`` expects; other errors of this package get the site's name.
    """
    try:
        return parse(reply.content)
    except NNUNetFlareError as error:
        error.site = site
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UpdateError(
            field="reply",
            expected="the content of this version's protocol",
            found=f"{type(error).__name__}",
            remedy="run the same version of nnunet-flare everywhere",
            site=site,
        ) from error


@dataclass(frozen=True, kw_only=True)
class SiteDescription:
    """A site's data, role and versions (package -> version), and the least number of sites in a sum that it opens."""

    schema: DatasetSchema
    role: str
    versions: Mapping[str, str]
    min_sites_in_sum: int

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> SiteDescription:
        role = content["role"]
        if role not in ROLES:
            raise ValueError(role)
        versions = {str(name): str(version) for name, version in content["versions"].items()}
        least = content["min_sites_in_sum"]
        if type(least) is not int or least < 2:
            raise ValueError(least)
        schema = DatasetSchema.from_json(content["schema"])
        return cls(schema=schema, role=role, versions=versions, min_sites_in_sum=least)


def check_versions(versions: Mapping[str, Mapping[str, str]]) -> None:
    """nnU-Net and this package must be the same everywhere; torch and Python may differ."""
    first = min(versions)
    for package in ("nnunet-flare", "nnunetv2"):
        for site, found in versions.items():
            if found.get(package) != versions[first].get(package):
                raise ConfigError(
                    field=f"version of {package}",
                    expected=f"{versions[first].get(package)} (as at {first})",
                    found=str(found.get(package)),
                    remedy="install the same version at every site",
                    site=site,
                )


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """A site's plans, as nnU-Net writes them, and the part of them that all sites must share."""

    plans: Mapping[str, Any]
    network_plan: Mapping[str, Any]

    @classmethod
    def parse(cls, configuration: str, content: Mapping[str, Any]) -> SitePlan:
        plans = dict(content["plans"])
        check_classes(plans, configuration)
        digests = content.get("digests")
        return cls(plans=plans, network_plan=network_plan(plans, configuration) if digests is None else dict(digests))


def site_architecture(configuration: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The part of its plans that a site tells where each plans for itself (``architecture_plans``)."""
    check_classes(content["plans"], configuration)
    return dict(content["plans"])


@dataclass(frozen=True, kw_only=True)
class SiteLayers:
    """A site's network, and the training cases of its fold."""

    network: Network
    num_training_cases: int

    @classmethod
    def parse(cls, num_training: int, content: Mapping[str, Any]) -> SiteLayers:
        """``num_training`` is what the site said of its data set before."""
        number = content["num_training_cases"]
        if type(number) is not int or not 1 <= number <= num_training:
            raise ValueError("a number of training cases that the data set does not have")
        return cls(network=network_from_json(content["signature"]), num_training_cases=number)


def site_round(role: str, labels: Collection[str], reply: Message, *, download_bytes: int, seconds: float) -> SiteRound:
    """A site's scores of a round; ``labels`` are those of its schema."""
    content = reply.content
    loss = float(content.get("train_loss", "nan"))
    if math.isinf(loss) or type(content["num_cases"]) is not int:
        raise ValueError("no finite loss, or no number of cases")
    return SiteRound(
        dice={_known(label, labels): _score(value, most=1) for label, value in content["dice"].items()},
        train_loss=loss,
        num_cases=content["num_cases"],
        upload_bytes=layer_bytes(reply.layers),
        download_bytes=download_bytes,
        seconds=seconds,
        role=role,
        num_clipped=_count(content.get("num_clipped", 0)),
        quantisation_error=_score(content.get("quantisation_error", 0.0), most=1),
    )


def site_final(cases: Sequence[Any], labels: Collection[str]) -> SiteFinal:
    """A site's scores of each case; ``labels`` are those of its schema."""
    scored = tuple({_known(label, labels): _metrics(**scores) for label, scores in case.items()} for case in cases)
    means, foreground = mean_metrics(scored)
    return SiteFinal(num_cases=len(scored), labels=means, foreground=foreground, cases=scored)


def _metrics(*, dsc: Any, hd95_mm: Any, nsd: Any) -> LabelMetrics:
    return LabelMetrics(dsc=_score(dsc, most=1), hd95_mm=_score(hd95_mm, most=1e9), nsd=_score(nsd, most=1))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("no count")
    return value


def _score(value: Any, *, most: float) -> float:
    number = float(value)
    if not (math.isnan(number) or 0 <= number <= most):
        raise ValueError("a score out of range")
    return number


def _known(label: str, labels: Collection[str]) -> str:
    if label not in labels:
        raise ValueError("a label that the site's schema does not have")
    return label
