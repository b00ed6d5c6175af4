"""Bytes that leave a site and reach it in one round, counted on the socket.

    python benchmarks/wire.py

A server cell and a site cell, FLARE's own, in two processes over TCP: the site fetches one train task and submits one
reply, as in a job. FLARE sends a message's text and lets the receiver fetch the arrays behind it chunk by chunk, so
every frame that either side writes to its socket is counted, requests for chunks and acknowledgements included (TLS
and TCP headers are not). Down is what the server wrote, up is what the site wrote.

The network is nnU-Net's PlainConvUNet of six stages for 3d_fullres. It is compared with the float32 bytes of its unique
tensors and with sending ``state_dict()`` as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message
from nvflare.fuel.f3.drivers.net_utils import get_open_tcp_port
from nvflare.fuel.f3.drivers.socket_conn import SocketConnection
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize

from nnunet_flare.flare.protocol import Message, layer_bytes
from nnunet_flare.nnunet.config import TrainingConfig

CHANNEL, GET_TASK, SUBMIT = "benchmark", "get_task", "submit"
TIMEOUT_S = 120.0
Arrays = dict[str, np.ndarray]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    nvflare_fobs_initialize()
    layers, state_dict = full_size_network()
    reference = layer_bytes(layers)
    rows: dict[str, tuple[Arrays, bool, str]] = {
        "nnunet-flare, float32": (layers, True, "1.01"),
        "nnunet-flare, float16": ({name: array.astype(np.float16) for name, array in layers.items()}, True, "0.51"),
        "state_dict() as it is": (state_dict, False, ""),
    }
    values = sum(array.size for array in layers.values())
    print(f"{len(layers)} layers, {values / 1e6:.1f} million parameters, {reference / 1e6:.1f} MB in float32\n")
    print(f"{'':<24}{'arrays':>8}{'down MB':>10}{'up MB':>10}{'down':>9}{'up':>9}{'target':>9}")
    server = Server()
    for number, (title, (arrays, ours, target)) in enumerate(rows.items(), start=1):
        down, up = server.exchange(arrays, site=f"site-{number}", ours=ours)
        print(
            f"{title:<24}{len(arrays):>8}{down / 1e6:>10.2f}{up / 1e6:>10.2f}"
            f"{down / reference:>9.4f}{up / reference:>9.4f}{target:>9}",
            flush=True,
        )
    os._exit(0)  # FLARE's threads keep waiting for sites


def full_size_network() -> tuple[Arrays, Arrays]:
    """Canonical layers, and every entry of ``state_dict()``, of nnU-Net's usual 3d_fullres network of six stages."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    from nnunet_flare.nnunet.weights import read_layers

    stages = 6
    architecture = {
        "n_stages": stages,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    network = get_network_from_plans(
        "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        architecture,
        ["conv_op", "norm_op", "dropout_op", "nonlin"],
        input_channels=1,
        output_channels=3,
        deep_supervision=True,
    )
    return read_layers(network), {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def to_message(arrays: Arrays, *, reply: bool) -> Shareable:
    """A train task, or a site's reply to it, with the text that goes with the layers."""
    content: Mapping[str, Any]
    if reply:
        content = {"dice": {"organ": 0.5, "tumour": 0.5}, "val_loss": 0.1, "num_cases": 100, "train_loss": 0.1}
    else:
        job = TrainingConfig().to_json()
        content = {"run": "ffe", "run_id": "0" * 32, "job": job, "round": 0, "update": "difference"}
    return Message(content=content, layers=arrays, difference=reply).to_shareable()


def to_plain_dxo(arrays: Arrays, *, reply: bool) -> Shareable:
    return DXO(DataKind.WEIGHTS, data=dict(arrays)).to_shareable()


class Server:
    """The server's cell, and what it hands out and must get back."""

    def __init__(self) -> None:
        self._url = f"tcp://localhost:{get_open_tcp_port({})}"
        self._cell = Cell(fqcn=FQCN.ROOT_SERVER, root_url=self._url, secure=False, credentials={})
        self._cell.register_request_cb(channel=CHANNEL, topic=GET_TASK, cb=self._hand_out)
        self._cell.register_request_cb(channel=CHANNEL, topic=SUBMIT, cb=self._accept)
        self._cell.start()

    def exchange(self, arrays: Arrays, *, site: str, ours: bool) -> tuple[int, int]:
        """One task down and one reply up; returns the bytes that server and site wrote."""
        self._arrays, self._to_shareable = arrays, to_message if ours else to_plain_dxo
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=run_site, args=(there, site, self._url, ours))
        with count_bytes() as counts:
            process.start()
            try:
                if not here.poll(TIMEOUT_S):
                    raise TimeoutError(f"{site} has not replied within {TIMEOUT_S:.0f} s")
                return counts[0], here.recv()
            finally:
                process.kill()

    def _hand_out(self, request: Any) -> Any:
        return make_reply(ReturnCode.OK, body=self._to_shareable(self._arrays, reply=False))

    def _accept(self, request: Any) -> Any:
        received = from_shareable(request.payload).data
        assert all(np.array_equal(received[name], array) for name, array in self._arrays.items())
        return make_reply(ReturnCode.OK)


def run_site(pipe: Connection, site: str, url: str, ours: bool) -> None:
    nvflare_fobs_initialize()
    cell = Cell(fqcn=site, root_url=url, secure=False, credentials={})
    connected = threading.Event()
    cell.core_cell.set_cell_connected_cb(lambda agent: connected.set())
    with count_bytes() as counts:
        cell.start()
        connected.wait(TIMEOUT_S)
        received = from_shareable(ask(cell, GET_TASK, None)).data
        ask(cell, SUBMIT, (to_message if ours else to_plain_dxo)(received, reply=True))
        pipe.send(counts[0])


def ask(cell: Cell, topic: str, payload: Shareable | None) -> Any:
    answer = cell.send_request(
        channel=CHANNEL,
        target=FQCN.ROOT_SERVER,
        topic=topic,
        request=new_cell_message({}, payload),
        timeout=TIMEOUT_S,
    )
    assert answer.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK, answer.headers
    return answer.payload


@contextlib.contextmanager
def count_bytes(counts: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Bytes of all frames that FLARE writes to sockets of this process, and reads from them: two integers that grow."""
    counts = np.zeros(2, np.int64) if counts is None else counts
    lock, send_frame, read_frame = threading.Lock(), SocketConnection.send_frame, SocketConnection.read_frame

    def counting_send(connection: SocketConnection, frame: Any) -> None:
        with lock:
            counts[0] += len(frame)
        send_frame(connection, frame)

    def counting_read(connection: SocketConnection) -> Any:
        frame = read_frame(connection)
        with lock:
            counts[1] += len(frame)
        return frame

    SocketConnection.send_frame, SocketConnection.read_frame = counting_send, counting_read
    try:
        yield counts
    finally:
        SocketConnection.send_frame, SocketConnection.read_frame = send_frame, read_frame


if __name__ == "__main__":
    main()
