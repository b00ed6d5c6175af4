"""A site's filters of an encrypted job: layers leave as ciphertexts or not at all, and sums are opened here.

Both fail closed: what they do not know does not pass. A refusal that has a reason travels in its place, in the fixed
schema of errors. They work as a job's filters and as those of a site's own privacy scope; where a site has them, those
of the job find the work done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from nnunet_flare.encryption.vector import EncryptedVector, Quantisation, VectorLayout, decrypt_vector, encrypt_vector
from nnunet_flare.errors import DecryptionError, EncryptionError, NNUNetFlareError
from nnunet_flare.flare import protocol
from nnunet_flare.flare.keys import SiteKeys
from nnunet_flare.flare.protocol import Message, read_message

__all__ = ["BFVDecryptFilter", "BFVEncryptFilter"]

_REQUEST, _RESULT = "nnunet_flare.request", "nnunet_flare.result"
"""Where a filter leaves what it found: task id and content, for FLARE may use one context for many tasks."""
Layers = dict[str, np.ndarray]
_ENCRYPTED_TASKS = (protocol.TRAIN, protocol.EXTRACT_FINGERPRINT)


class BFVDecryptFilter(Filter):
    """Opens the encrypted sums in a task's data."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        if _left(_REQUEST, fl_ctx) is not None:
            return shareable
        request = read_message(shareable, sender="server", take=True)
        _leave(_REQUEST, request.content, fl_ctx)
        return _or_its_reason(lambda: self._decrypted(request.content, request.layers, fl_ctx), shareable, fl_ctx)

    def _decrypted(self, content: Mapping[str, Any], layers: Layers, fl_ctx: FLContext) -> Message:
        """``layers`` is emptied on the way, so that memory does not double."""
        if "encryption" not in content:
            raise _refusal("job", "an encrypted one, as this site's policy says", "one in clear text", "")
        keys, opened, seen = SiteKeys.of(content, fl_ctx), {}, {}
        for group, told in _vectors(content).items():
            scope, found = told["layout"].scope, told["sum"]["round"] if told["sum"] else -1
            newest = keys.newest_round(scope)
            if found < newest or found >= content.get("round", math.inf):
                raise _refusal("round of the sum", f"{newest} or a later one that is over", str(found), "server")
            if told["sum"]:
                opened |= _open_sum(group, told["sum"], layers, keys)
                seen[scope] = found
            else:
                initial = {name for name in told["layout"].shapes if name in layers and layers[name].dtype.kind == "f"}
                opened |= {name: layers.pop(name) for name in initial}
        if layers:
            raise _refusal("layers", "sums of the groups that the request names", "others beside them", "server")
        if seen:
            keys.saw(seen)
        return Message(content=content, layers=opened)


def _open_sum(group: str, told: Mapping[str, Any], layers: Layers, keys: SiteKeys) -> dict[str, np.ndarray]:
    names = [name for name in layers if name.startswith(f"{group}/")]
    arrays = {name.partition("/")[2]: layers.pop(name) for name in names}
    vector, least = EncryptedVector.from_arrays(arrays, site="server"), keys.settings.min_sites_in_sum
    arrays.clear()
    try:
        return decrypt_vector(vector, told["layout"], keys.key(), round_number=told["round"], least_sites=least)
    except DecryptionError:
        keys.destroy()
        raise


class BFVEncryptFilter(Filter):
    """Encrypts the layers of a task's result; a result that must not be in clear text does not leave so."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        if _left(_RESULT, fl_ctx) is shareable:
            return shareable
        if (code := shareable.get_return_code(ReturnCode.OK)) != ReturnCode.OK:
            return make_reply(code)
        result = _or_its_reason(lambda: self._encrypted(shareable, fl_ctx), shareable, fl_ctx)
        _leave(_RESULT, result, fl_ctx)
        return result

    def _encrypted(self, shareable: Shareable, fl_ctx: FLContext) -> Message:
        request, task, site = (
            _left(_REQUEST, fl_ctx),
            fl_ctx.get_prop(FLContextKey.TASK_NAME),
            fl_ctx.get_identity_name(),
        )
        reply = read_message(shareable, sender=site, take=True)  # a site's own error is raised, and travels
        if request is None:
            raise _refusal("filters", "BFVDecryptFilter before BFVEncryptFilter", "none", site)
        if reply.layers and task in _ENCRYPTED_TASKS:
            vectors, cost = _vectors_of(reply.layers, request, SiteKeys.of(request, fl_ctx))
            content = {**reply.content, "num_clipped": cost.num_clipped, "quantisation_error": cost.largest_error}
            return Message(content=content, layers=vectors)
        if reply.layers or "summary" in reply.content or task not in protocol.TASKS + protocol.KEY_TASKS:
            expected = "a job whose results are encrypted, for this site lets none leave in clear text"
            raise _refusal(f"result of {task}", expected, "one in clear text", site)
        return reply


def _vectors_of(
    layers: Layers, request: Mapping[str, Any], keys: SiteKeys
) -> tuple[dict[str, np.ndarray], Quantisation]:
    """One vector for each group of the request; ``layers`` is emptied."""
    arrays, cost = {}, Quantisation()
    site, least, round_number = keys.settings.site, keys.settings.min_sites_in_sum, request.get("round", 0)
    for group, told in _vectors(request).items():
        if (number := len(told["layout"].weights)) < least:
            expected = f"at least {least}, as this site's settings say (min_sites_in_sum)"
            raise _refusal("sites of the group", expected, str(number), site)
        vector, lost = encrypt_vector(layers, told["layout"], keys.key(), site=site, round_number=round_number)
        arrays |= {f"{group}/{name}": array for name, array in vector.to_arrays().items()}
        cost += lost
    if layers:
        raise _refusal("result", "the layers of the groups that the request names", "others", site)
    return arrays, cost


def _vectors(request: Mapping[str, Any]) -> dict[str, Any]:
    """Group -> its layout, and round and layout of its sum if there is one, as the server tells them."""
    try:
        told = {}
        for group, sent in request.get("vectors", {}).items():
            layout, before = VectorLayout.from_json(sent["layout"]), sent["sum"]
            if before is not None:
                before = {"layout": VectorLayout.from_json(before["layout"]), "round": before["round"]}
                if type(before["round"]) is not int or before["layout"].scope != layout.scope:
                    raise ValueError("another vector's sum")
            fold = protocol.FINGERPRINT if group == protocol.FINGERPRINT else f"{request['job']['fold']}/{group}"
            if layout.scope != f"{request['run_id']}/{fold}":
                raise ValueError("another run's vector")
            told[group] = {"layout": layout, "sum": before}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _refusal("vectors", "their layouts", type(error).__name__, "server") from error
    return told


def _leave(name: str, value: Any, fl_ctx: FLContext) -> None:
    fl_ctx.set_prop(name, (fl_ctx.get_prop(FLContextKey.TASK_ID), value), private=True, sticky=False)


def _left(name: str, fl_ctx: FLContext) -> Any:
    task_id, value = fl_ctx.get_prop(name) or (None, None)
    return value if task_id == fl_ctx.get_prop(FLContextKey.TASK_ID) else None


def _or_its_reason(work: Callable[[], Message], shareable: Shareable, fl_ctx: FLContext) -> Shareable:
    """What ``work`` makes of a message, or why it refuses, instead of the message."""
    try:
        return work().to_shareable(instead_of=shareable)
    except NNUNetFlareError as error:
        error.site = error.site or fl_ctx.get_identity_name()
        return protocol.error_message(error).to_shareable(instead_of=shareable)


def _refusal(name: str, expected: str, found: str, site: str) -> EncryptionError:
    remedy = "submit an encrypted job of this version (jobs/ffe_he, jobs/asym_fedavg_he); see docs/privacy.md"
    return EncryptionError(field=name, expected=expected, found=found, remedy=remedy, site=site)
