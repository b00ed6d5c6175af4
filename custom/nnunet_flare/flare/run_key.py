"""The key of an encrypted run as its server knows it: by name. The server relays it sealed, and cannot open it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare.encryption.parameters import PARAMETERS, Parameters
from nnunet_flare.errors import ConfigError, EncryptionError, NNUNetFlareError, ParticipationError
from nnunet_flare.flare import protocol
from nnunet_flare.flare.conductor import Conductor, RunStoppedError
from nnunet_flare.flare.protocol import Message
from nnunet_flare.flare.replies import cast
from nnunet_flare.storage import read_json, write_json

__all__ = ["RunKey", "agree_on_key", "forget_key"]


@dataclass(frozen=True, kw_only=True)
class RunKey:
    """Name of the key, and the parameters it is for."""

    id: str
    parameters: Parameters


def agree_on_key(
    conductor: Conductor,
    content: Mapping[str, Any],
    *,
    sites: Mapping[str, str],
    holder: str,
    num_sites: int,
    record: Path,
) -> RunKey:
    """Have every site hold the run's key; the key holder makes it, or seals it again for those that lack it.

    Args:
        conductor: Asks the sites.
        content: What every request says of the run.
        sites: Site -> role.
        holder: The hospital that makes the key.
        num_sites: Sites that train; they decide the parameters, which stay as they are for the run.
        record: File that names the key.

    Raises:
        ConfigError: more sites than the parameters bear.
        EncryptionError: a site refuses a certificate or an envelope, or the run's key is lost at its holder.
    """
    known, parameters = None, Parameters.for_sites(num_sites)
    if record.exists():
        known, parameters = read_json(record)["key"], PARAMETERS[read_json(record)["parameters"]]
        if num_sites > parameters.max_sites:
            raise ConfigError(
                field="sites that train",
                expected=f"{parameters.max_sites} at most, for the key that this run began with",
                found=str(num_sites),
                remedy="start a run of another name with all sites",
            )
    if holder not in sites:
        remedy = "correct the job, or start the site"
        raise ParticipationError(field="key_holder", expected=f"one of {', '.join(sites)}", found=holder, remedy=remedy)
    replies = conductor.ask_every(dict.fromkeys(sites, (protocol.CERTIFICATE, Message(content=content))))
    told = {site: cast(site, reply, _certificate) for site, reply in replies.items()}
    lacking = {site: pem for site, (pem, key) in told.items() if key is None or key != known}
    if known is not None and holder in lacking:
        raise EncryptionError(
            field="key",
            expected="the key that this run began with",
            found="none",
            remedy="restore the run's folder at this site, or start a run of another name",
            site=holder,
        )
    if lacking:
        known = _distribute(conductor, content, lacking, holder=holder, parameters=parameters, known=known)
        write_json(record, {"key": known, "parameters": parameters.id})
    assert known is not None, "nobody lacks it"
    return RunKey(id=known, parameters=parameters)


def _distribute(
    conductor: Conductor,
    content: Mapping[str, Any],
    certificates: Mapping[str, str],
    *,
    holder: str,
    parameters: Parameters,
    known: str | None,
) -> str:
    """Have the key sealed for those who lack it, and opened there."""
    question = {**content, "parameters": parameters.id, "certificates": dict(certificates)}
    made = conductor.ask_every({holder: (protocol.MAKE_KEY, Message(content=question))})[holder]
    key, envelopes = cast(holder, made, lambda sent: (str(sent["key"]), dict(sent["envelopes"])))
    received = conductor.ask_every(
        {
            site: (protocol.RECEIVE_KEY, Message(content={**content, "envelope": envelopes.get(site)}))
            for site in certificates
        }
    )
    names = {holder: key} | {site: cast(site, reply, lambda sent: str(sent["key"])) for site, reply in received.items()}
    for site, name in names.items():
        if name != (known or key):
            raise EncryptionError(
                field="key",
                expected=known or key,
                found=name,
                remedy="start a run of another name for a new key",
                site=site,
            )
    return key


def _certificate(content: Mapping[str, Any]) -> tuple[str, str | None]:
    pem, key = content["certificate"], content["key"]
    if not isinstance(pem, str) or not isinstance(key, str | None):
        raise TypeError("a certificate and the id of a key")
    return pem, key


def forget_key(
    conductor: Conductor, content: Mapping[str, Any], sites: Iterable[str], say: Callable[[str], None]
) -> None:
    """Ask every site to destroy its key; one that is not there keeps its sealed envelope until it is removed."""
    asked = dict.fromkeys(sites, (protocol.FORGET_KEY, Message(content=content)))
    with suppress(NNUNetFlareError, RunStoppedError):
        for error in conductor.ask(asked, lambda site, reply: None).failures.values():
            say(f"the key was not destroyed: {error}")
