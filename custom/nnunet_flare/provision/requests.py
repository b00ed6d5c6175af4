"""Whose requests a hospital's FLARE client answers."""

from __future__ import annotations

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.fed.client.shell_cmd import ShellCommandProcessor

__all__ = ["RequestGate"]


class RequestGate(FLComponent):
    """Answers the server and this site's own processes only, and no shell command whoever asks.

    FLARE relays any site's request to any other, and a site asks for no right where the request's header says that none
    is needed: another hospital, or the server, could list this one's folders and read its text files.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            try:
                self._close(fl_ctx)
            except Exception as error:  # FLARE logs any other kind, and starts
                raise UnsafeComponentError(f"the request gate cannot be closed: {error!r}") from error

    def _close(self, fl_ctx: FLContext) -> None:
        processors = ClientRequestProcessors.request_processors
        processors[:] = [item for item in processors if not isinstance(item, ShellCommandProcessor)]
        cell = fl_ctx.get_prop(FLContextKey.SITE_OBJ).cell.core_cell
        known = {FQCN.ROOT_SERVER, FQCN.get_root(cell.get_fqcn())}
        cell.add_incoming_request_filter("*", "*", self._refuse_others, known=known)

    def _refuse_others(self, request: Message, known: set[str]) -> Message | None:
        origin = request.get_header(MessageHeaderKey.ORIGIN, "")
        if FQCN.get_root(origin) in known:
            return None
        channel, topic = (request.get_header(key) for key in (MessageHeaderKey.CHANNEL, MessageHeaderKey.TOPIC))
        self.logger.error(f"refused a request of {origin!r} ({channel}, {topic}): only the server may ask this site")
        return make_reply(ReturnCode.UNAUTHENTICATED, "only the server may ask this site")
