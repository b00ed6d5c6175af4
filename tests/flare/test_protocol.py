"""What travels: layers and JSON text get through unchanged, everything else is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.fuel.utils import fobs
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize

from nnunet_flare.errors import ConfigError, DatasetError, NNUNetFlareError, UpdateError, WorkerError
from nnunet_flare.flare.protocol import Message, error_message, layer_bytes, read_message

nvflare_fobs_initialize()

TEXT = "nnunet_flare"
WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def over_the_wire(shareable: Shareable) -> Shareable:
    return fobs.loads(fobs.dumps(shareable))


def weights(layers: object, text: object = "{}") -> Shareable:
    return DXO(DataKind.WEIGHTS, data=layers, meta={TEXT: text}).to_shareable()


def text_only(text: object) -> Shareable:
    return DXO(DataKind.APP_DEFINED, data={TEXT: text}).to_shareable()


def altered(change) -> Shareable:
    shareable = text_only("{}")
    change(shareable)
    return shareable


@pytest.mark.parametrize("difference", [True, False])
def test_layers_and_content_survive_flares_serialization(difference):
    generator = np.random.default_rng(0)
    large = generator.normal(size=(3, 7, 3, 3)).astype(np.float32)
    layers = {
        "encoder.stages.0.conv.weight": large,
        "half": large.astype(np.float16),
        "transposed": large.T,
        "strided": large[::2, 1:5],
        "0-d": np.float32(1.5).reshape(()),
        "empty": np.empty((0, 3), np.float32),
        "special": np.float32([np.nan, np.inf, -0.0, 1e-45]),
    }
    content = {"round": 3, "dice": {"LV": 0.5}, "site": "Zürich", "nothing": None, "list": [1, [2.5, "a"]]}
    message = Message(content=content, layers=layers, difference=difference)
    received = read_message(over_the_wire(message.to_shareable()), sender="site-1")
    assert received.content == content
    assert received.difference is difference
    assert received.layers.keys() == layers.keys()
    for name, array in layers.items():
        assert received.layers[name].dtype == array.dtype
        np.testing.assert_array_equal(received.layers[name], array, strict=True)


def test_a_message_without_layers_survives_too():
    received = read_message(over_the_wire(Message(content={"run": "heart"}).to_shareable()), sender="server")
    assert received == Message(content={"run": "heart"})


FOREIGN = {
    "an empty shareable": Shareable(),
    "a shareable that is no DXO": Shareable({"weights": {"w": WEIGHT}}),
    "another data kind": DXO(DataKind.METRICS, data={TEXT: "{}"}).to_shareable(),
    "analytic data": DXO(DataKind.ANALYTIC, data={TEXT: "{}"}).to_shareable(),
    "a collection of messages": DXO(
        DataKind.COLLECTION, data={TEXT: DXO(DataKind.APP_DEFINED, data={TEXT: "{}"})}
    ).to_shareable(),
    "no text": DXO(DataKind.APP_DEFINED, data={"other": "{}"}).to_shareable(),
    "no text beside layers": DXO(DataKind.WEIGHTS, data={"w": WEIGHT}).to_shareable(),
    "an object array": weights({"w": np.array([{"patient": 7}], dtype=object)}),
    "an array of text": weights({"w": np.array(["patient 7"])}),
    "an integer array": weights({"w": np.arange(3)}),
    "a complex array": weights({"w": np.array([1j])}),
    "a structured array": weights({"w": np.zeros(2, dtype=[("a", "f4")])}),
    "a nested dict": weights({"block": {"w": WEIGHT}}),
    "a list": weights({"w": [1.0, 2.0]}),
    "a number": weights({"w": 1.0}),
    "text among the layers": weights({"w": WEIGHT, "note": "patient 7"}),
    "a layer without a name": weights({7: WEIGHT}),
    "layers that are a list": altered(lambda shareable: shareable.update(weights({"w": WEIGHT}), DXO=None)),
    "text that is no JSON": text_only("{round: 3}"),
    "no text but a dict": text_only({"round": 3}),
    "no text but bytes of another kind": text_only(np.arange(3)),
    "a JSON list": text_only("[1, 2]"),
    "a JSON number": text_only("7"),
    "JSON null": text_only("null"),
    "JSON nested beyond measure": text_only("[" * 100_000),
    "extra data beside the text": DXO(
        DataKind.APP_DEFINED, data={TEXT: "{}", "image": np.zeros((4, 4), np.float32)}
    ).to_shareable(),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_the_protocol_is_refused(kind):
    with pytest.raises(UpdateError) as refusal:
        read_message(FOREIGN[kind], sender="site-1")
    assert refusal.value.site == "site-1"
    assert refusal.value.field == "message"
    assert "patient" not in str(refusal.value)


def test_what_filters_note_beside_the_layers_does_not_get_into_the_message():
    shareable = DXO(DataKind.WEIGHTS, data={"w": WEIGHT}, meta={TEXT: "{}", "patient": 7}).to_shareable()
    message = read_message(shareable, sender="site-1")
    assert message.content == {}
    assert message.layers.keys() == {"w"}


def test_a_torch_tensor_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(UpdateError, match="Tensor among the layers"):
        read_message(weights({"w": torch.zeros(2)}), sender="site-1")


@pytest.mark.parametrize("code", [ReturnCode.EXECUTION_EXCEPTION, ReturnCode.TASK_RESULT_FILTER_ERROR, "SOMETHING"])
def test_flares_own_failure_codes_are_a_worker_error_that_names_site_and_code(code):
    with pytest.raises(WorkerError, match=f"site-2: reply: expected a result, found FLARE's return code {code}"):
        read_message(make_reply(code), sender="site-2")


def test_a_reported_error_arrives_field_by_field_with_the_senders_name():
    sent = DatasetError(
        field="fold", expected="5 cases", found="4", remedy="add one", site="somebody else", local_detail="patient_07"
    )
    shareable = over_the_wire(error_message(sent).to_shareable())
    assert b"patient_07" not in fobs.dumps(shareable)
    with pytest.raises(DatasetError) as received:
        read_message(shareable, sender="site-2")
    assert str(received.value) == "site-2: fold: expected 5 cases, found 4; add one"
    assert received.value.local_detail == ""


def test_an_error_reply_keeps_the_fixed_fields_only():
    sent = {"code": "config", "field": "fold", "patient": "Ms Smith", "local_detail": "Ms Smith", "args": ["Ms Smith"]}
    with pytest.raises(ConfigError) as received:
        read_message(text_only(json.dumps({"error": sent})), sender="site-1")
    assert "Smith" not in repr(vars(received.value)) + str(received.value) + repr(received.value.to_reply())


def test_long_fields_are_cut_at_both_ends():
    sent = ConfigError(field="f" * 9999, expected="e" * 9999, found="n" * 9999, remedy="r" * 9999)
    assert max(map(len, sent.to_reply().values())) == 500
    forged = {"code": "config"} | dict.fromkeys(("field", "expected", "found", "remedy"), "x" * 9999)
    with pytest.raises(ConfigError) as received:
        read_message(text_only(json.dumps({"error": forged})), sender="site-1")
    assert max(map(len, received.value.to_reply().values())) == 500


@pytest.mark.parametrize("forged", [{}, {"code": ["config"]}, {"code": "unheard of"}, {"field": {"a": [1]}}])
def test_a_malformed_error_is_still_an_error_of_that_site(forged):
    with pytest.raises(NNUNetFlareError) as received:
        read_message(text_only(json.dumps({"error": forged})), sender="site-1")
    assert received.value.site == "site-1"
    assert all(isinstance(value, str) for value in received.value.to_reply().values())


def test_the_size_on_the_wire_is_that_of_the_values():
    assert layer_bytes({"w": WEIGHT, "h": WEIGHT.astype(np.float16)}) == 24 + 12
    assert layer_bytes({}) == 0
