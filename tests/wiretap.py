"""Writes down every byte that a FLARE process receives and sends, as it is behind TLS.

``sitecustomize.py`` of the process calls ``install``; its job processes inherit that. One file for each process, named
by its program, in the folder of the environment variable ``WIRETAP``.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path


def install() -> None:
    from nvflare.fuel.f3.sfm.conn_manager import SfmFrameReceiver
    from nvflare.fuel.f3.sfm.sfm_conn import SfmConnection

    receive, send, lock = SfmFrameReceiver.process_frame, SfmConnection.send_frame, threading.Lock()

    def record(*parts: bytes | bytearray | memoryview | None) -> None:
        file = Path(os.environ["WIRETAP"]) / f"{Path(sys.argv[0]).stem}-{os.getpid()}"
        with lock, file.open("ab") as frames:
            frames.writelines(part for part in parts if part)

    def received(self, frame):
        record(frame)
        receive(self, frame)

    def sent(self, prefix, headers, payload):
        record(self.headers_to_bytes(headers), payload)
        send(self, prefix, headers, payload)

    SfmFrameReceiver.process_frame, SfmConnection.send_frame = received, sent
