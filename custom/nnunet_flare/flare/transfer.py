"""Fetching the layers that a reply has announced, and no more of them than the site's network has."""

from __future__ import annotations

from typing import Any

from nvflare.apis.signal import Signal
from nvflare.apis.utils.task_utils import materialize_lazy_download_refs
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.utils.fobs import FOBSContextKey

from nnunet_flare.errors import ParticipationError, UpdateError

__all__ = ["fetch_layers"]

_MARGIN_BYTES = 1 << 20  # names, shapes and headers of the arrays


def fetch_layers(layers: dict[str, Any], *, cell: Cell, site: str, max_bytes: int, give_up: Signal) -> dict[str, Any]:
    """Replace FLARE's references by the arrays that they stand for.

    Args:
        layers: Name -> reference, of a reply that FLARE was told not to resolve.
        cell: Of the server's job.
        site: Whose reply it is.
        max_bytes: What the site's layers can be at most; the transfer is broken off beyond it.
        give_up: Ends the transfer.

    Raises:
        UpdateError: the site sends more.
        ParticipationError: the transfer broke, or was given up.
    """
    metered = _MeteredCell(cell, max_bytes + _MARGIN_BYTES, give_up)
    try:
        return materialize_lazy_download_refs(layers, metered, metered.stop)
    except Exception as error:  # whatever FLARE raises, and whatever the site sent
        if metered.is_too_much:
            raise UpdateError(
                field="layers",
                expected=f"at most {max_bytes} bytes, which its layers are",
                found="more",
                remedy="run the same version of nnunet-flare everywhere, and no filter that adds to an update",
                site=site,
            ) from error
        late = "the deadline before all were fetched" if give_up.triggered else "a broken transfer"
        raise ParticipationError(
            field="layers",
            expected="the layers that the site announced",
            found=f"{late} ({type(error).__name__})",
            remedy="see whether the site is connected; it takes part in the next round again",
            site=site,
            local_detail=str(error),
        ) from error


class _MeteredCell:
    """FLARE's cell for one transfer: counts what arrives, and stops it when it is too much."""

    def __init__(self, cell: Cell, max_bytes: int, give_up: Signal) -> None:
        self._cell, self._left, self.stop = cell, max_bytes, Signal(parent=give_up)

    @property
    def is_too_much(self) -> bool:
        return self._left < 0

    def get_fobs_context(self, props: dict[str, Any]) -> dict[str, Any]:
        return self._cell.get_fobs_context({**props, FOBSContextKey.CELL: self})

    def send_request(self, *arguments: Any, **options: Any) -> Any:
        reply = self._cell.send_request(*arguments, **options)
        data = reply.payload.get("data") if isinstance(reply.payload, dict) else None
        self._left -= sum(map(len, data)) if isinstance(data, list) else len(data or b"")
        if self.is_too_much:
            self.stop.trigger(True)
        return reply

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cell, name)
