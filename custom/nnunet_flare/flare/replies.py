"""What sites answer, cast to the types that the controller works with; anything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nnunet_flare.aggregation.network import Network, network_from_json
from nnunet_flare.errors import NNUNetFlareError, UpdateError
from nnunet_flare.flare.history import SiteFinal, SiteRound
from nnunet_flare.flare.protocol import Message, layer_bytes
from nnunet_flare.nnunet.metrics import LabelMetrics, mean_metrics
from nnunet_flare.nnunet.network_plan import check_classes, network_plan
from nnunet_flare.nnunet.schema import DatasetSchema
from nnunet_flare.nnunet.site import ROLES

__all__ = ["SiteDescription", "SiteLayers", "SitePlan", "cast", "site_architecture", "site_final", "site_round"]

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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UpdateError(
            field="reply",
            expected="the content of this version's protocol",
            found=f"{type(error).__name__}",
            remedy="run the same version of nnunet-flare everywhere",
            site=site,
        ) from error


@dataclass(frozen=True, kw_only=True)
class SiteDescription:
    """A site's data, role and versions (package -> version)."""

    schema: DatasetSchema
    role: str
    versions: Mapping[str, str]

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> SiteDescription:
        role = content["role"]
        if role not in ROLES:
            raise ValueError(role)
        versions = {str(name): str(version) for name, version in content["versions"].items()}
        return cls(schema=DatasetSchema.from_json(content["schema"]), role=role, versions=versions)


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """A site's plans, as nnU-Net writes them, and the part of them that all sites must share."""

    plans: Mapping[str, Any]
    network_plan: Mapping[str, Any]

    @classmethod
    def parse(cls, configuration: str, content: Mapping[str, Any]) -> SitePlan:
        plans = dict(content["plans"])
        check_classes(plans, configuration)
        return cls(plans=plans, network_plan=network_plan(plans, configuration))


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
    def parse(cls, content: Mapping[str, Any]) -> SiteLayers:
        number = int(content["num_training_cases"])
        if number < 1:
            raise ValueError(number)
        return cls(network=network_from_json(content["signature"]), num_training_cases=number)


def site_round(role: str, reply: Message, download_bytes: int, seconds: float) -> SiteRound:
    content = reply.content
    return SiteRound(
        dice={str(label): float(value) for label, value in content["dice"].items()},
        train_loss=float(content.get("train_loss", "nan")),
        num_cases=int(content["num_cases"]),
        upload_bytes=layer_bytes(reply.layers),
        download_bytes=download_bytes,
        seconds=seconds,
        role=role,
    )


def site_final(cases: Sequence[Any]) -> SiteFinal:
    scored = tuple(
        {
            str(label): LabelMetrics(**{name: float(value) for name, value in scores.items()})
            for label, scores in case.items()
        }
        for case in cases
    )
    labels, foreground = mean_metrics(scored)
    return SiteFinal(num_cases=len(scored), labels=labels, foreground=foreground, cases=scored)
