"""What a server of an encrypted job has of the sites' weights, on its disk and on its lines: nothing.

The same search finds the weights of plain jobs, which the same server runs.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zstandard

from commands import run
from conftest import tiny_job
from nnunet_flare.encryption.fixed_point import pack
from nnunet_flare.encryption.key import AggregationKey
from nnunet_flare.encryption.vector import EncryptedVector, VectorLayout, decrypt_vector
from nnunet_flare.flare.config import EncryptionConfig
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.flare.identity import kit_identity
from nnunet_flare.flare.keys import SiteKeys
from nnunet_flare.flare.run import read_arrays
from nnunet_flare.nnunet.model import read_weights
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.storage import read_json
from traces import Traces

if TYPE_CHECKING:
    from local_federation import LocalFederation

WINDOW, NUM_WINDOWS = 64, 200
LARGE_LAYER = 4096
SECRET, PLAIN, DIFFERENCES = "secret", "plain", "differences"
NARROW = {"plans_overrides": {"batch_size": 2, "architecture.arch_kwargs.features_per_stage": [16, 32, 64, 128]}}
ENCRYPTED = NARROW | {"num_rounds": 2, "seed": 1}
FLOATS = ("float32", "float16", "float64")
Layers = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Three jobs of one server, and what was found of them.

    Args:
        on_disk: Name of a search -> part of its sequences that are in the server's and the lead's files.
        on_the_wire: The same, in what the server's processes have received and sent.
        envelopes: Site -> what it held of the key while the encrypted job ran.
        results: Of the encrypted run, as the lead fetched them.
        said: By the fetching.
        processes: Program of each of the server's that has received or sent.
    """

    on_disk: Mapping[str, float]
    on_the_wire: Mapping[str, float]
    envelopes: Mapping[str, Mapping[str, str]]
    results: Path
    said: str
    processes: tuple[str, ...]


def windows(values: np.ndarray) -> list[np.ndarray]:
    """Random pieces of a vector that are not constant."""
    starts = np.random.default_rng(0).integers(0, values.size - WINDOW, NUM_WINDOWS)
    pieces = [values[start : start + WINDOW] for start in starts]
    return [piece for piece in pieces if piece.min() < piece.max()]


def float_forms(name: str, layers: Layers) -> dict[str, list[bytes]]:
    """Name of a search -> sequences of bytes, for each form that numbers could have."""
    pieces = windows(np.concatenate([array.reshape(-1) for array in layers.values() if array.size >= LARGE_LAYER]))
    return {f"{name} {kind}": [piece.astype(kind).tobytes() for piece in pieces] for kind in FLOATS}


def integer_forms(name: str, layers: Layers, layout: VectorLayout, key: AggregationKey, site: str):
    """As the site rounds its weights, before it encrypts them."""
    values = np.concatenate([layers[layer].reshape(-1) for layer in layout.shapes])
    integers, *_ = layout.fixed_point(key.parameters).encode(values, share=layout.share((site,)))
    slots = pack(integers[: integers.size // 2 * 2], key.parameters.field_bits)
    forms = {"int64": integers, "int32": integers.astype(np.int32), "slots": slots}
    return {f"{name} {form}": [piece.tobytes() for piece in windows(array)] for form, array in forms.items()}


def key_forms(key: AggregationKey) -> dict[str, list[bytes]]:
    """Pieces of the secret keys, raw and as text; base64 depends on where a piece begins, modulo three.

    SEAL packs the coefficients of its key behind a header of 16 bytes; both forms are looked for.
    """
    coefficients = zstandard.ZstdDecompressor().decompressobj().decompress(key.secret[16:])
    texts = [base64.b64encode(key.secret[shift:]) for shift in range(3)]
    return {
        "key": [item for text in (key.secret, coefficients, *texts) for item in _cut(text)],
        "mark key": [key.mark_key, base64.b64encode(key.mark_key)],
    }


def _cut(content: bytes) -> Iterable[bytes]:
    return (content[start : start + WINDOW] for start in range(0, len(content) - WINDOW + 1, WINDOW))


def trained(home: Path, site: str, name: str, round_number: int) -> dict[str, np.ndarray]:
    """A site's layers after its local epochs, as its checkpoint has them: what it sends."""
    (file,) = (home / site / "runs" / name / "checkpoints").rglob(f"round_{round_number:05d}.pt")
    stored = torch.load(file, map_location="cpu", weights_only=True)["layers"]
    return {layer: tensor.numpy() for layer, tensor in stored.items()}


def global_layers(home: Path, name: str, round_number: int) -> dict[str, np.ndarray]:
    """What the server keeps that a round, counted from 0, begins with."""
    return read_arrays(home / "server" / "runs" / name / "state" / f"global_{round_number:05d}.npz")


def opened(sums: Layers, key: AggregationKey) -> tuple[dict[str, np.ndarray], VectorLayout]:
    """The means that the server's file holds encrypted."""
    arrays = {name.partition("/")[2]: array for name, array in sums.items()}
    told = json.loads(arrays.pop("layout").tobytes())
    layout, vector = VectorLayout.from_json(told["layout"]), EncryptedVector.from_arrays(arrays)
    return decrypt_vector(vector, layout, key, round_number=told["round"], least_sites=3), layout


def minus(layers: Layers, before: Layers) -> dict[str, np.ndarray]:
    return {name: array - before[name] for name, array in layers.items()}


def key_of(federation: LocalFederation, site: str, name: str) -> AggregationKey:
    """The key in a site's envelope, opened with the private key of its kit."""
    kit, folder = federation.kits[site], federation.home / site / "runs" / name
    settings = SiteSettings.load(site, kit / "local")
    return SiteKeys(folder, read_json(folder / "run.json")["run_id"], kit_identity(kit, settings), settings).key()


@pytest.fixture(scope="module")
def frames(federation: LocalFederation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The server writes down what its processes receive and send; afterwards it is as it was."""
    from local_federation import SERVER

    tap, folder = tmp_path_factory.mktemp("tap"), tmp_path_factory.mktemp("frames")
    (tap / "sitecustomize.py").write_text("import wiretap\n\nwiretap.install()\n")
    path = os.pathsep.join(filter(None, [str(tap), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    restart(federation, SERVER, PYTHONPATH=path, WIRETAP=str(folder))
    yield folder
    restart(federation, SERVER)


def restart(federation: LocalFederation, name: str, **environment: str) -> None:
    federation.stop(name)
    federation.start(name, **environment)
    federation.wait_until_listening()
    with federation.session() as session:
        federation.wait_for_sites(session)


@contextlib.contextmanager
def submitted(federation: LocalFederation, job: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The lead submits a job and follows it to its end, which must be that of its run."""
    program = Path(sys.executable).with_name("nnunet-flare")
    command = [program, "submit", job.name, "--kit", federation.user("lead"), "--follow", *options]
    environment = os.environ | {"HOME": str(job.parent)}
    with subprocess.Popen(command, cwd=job.parent, env=environment, stdout=subprocess.PIPE, text=True) as submission:
        yield submission
        submission.communicate(timeout=600)
    assert submission.returncode == 0


def wait_while_running(submission: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
    while not holds():
        assert submission.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="module")
def secret_run(
    federation: LocalFederation, frames: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AggregationKey, dict[str, Any]]:
    """An encrypted run: its key, and site -> the envelope that it held."""
    job = tiny_job(tmp_path_factory.mktemp("job"), SECRET, training=ENCRYPTED, encryption=EncryptionConfig())
    files = {site: federation.home / site / "runs" / SECRET / "encryption" / "key.json" for site in federation.sites}
    with submitted(federation, job) as submission:
        wait_while_running(submission, lambda: all(file.exists() for file in files.values()))
        return key_of(federation, "hospital-b", SECRET), {
            site: read_json(file)["envelope"] for site, file in files.items()
        }


@pytest.fixture(scope="module")
def watched(
    federation: LocalFederation,
    secret_run: tuple[AggregationKey, dict[str, Any]],
    frames: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Watched:
    (key, envelopes), folder = secret_run, tmp_path_factory.mktemp("jobs")
    kit, home, sites = federation.user("lead"), federation.home, federation.sites
    said = run("nnunet-flare", "fetch", SECRET, "--kit", kit, "--out", "results", folder=folder)

    plain = NARROW | {"num_rounds": 2, "seed": 2, "update": "weights"}
    for job in (tiny_job(folder, PLAIN, training=plain), tiny_job(folder, DIFFERENCES, training=NARROW | {"seed": 3})):
        assert federation.run_job(job)["status"] == "FINISHED:COMPLETED"

    mean, layout = opened(global_layers(home, SECRET, 1), key)
    searches = key_forms(key) | {"envelopes": [parts["wrapped"].encode() for parts in envelopes.values()]}
    for name, first in ((SECRET, mean), (PLAIN, global_layers(home, PLAIN, 1))):
        last = global_layers(home, name, 2)
        for number, layers in enumerate((first, opened(last, key)[0] if name == SECRET else last), 1):
            searches |= float_forms(f"{name}: mean of round {number}", layers)
        for site in sites:
            layers = [trained(home, site, name, number) for number in (0, 1)]
            for number in (0, 1):
                searches |= float_forms(f"{name}: {site}, round {number + 1}", layers[number])
                searches |= integer_forms(f"{name}: {site}, round {number + 1}", layers[number], layout, key, site)
            searches |= float_forms(f"{name}: change at {site}, round 2", minus(layers[1], first))
    before = global_layers(home, DIFFERENCES, 0)
    for site in sites:
        layers = minus(trained(home, site, DIFFERENCES, 0), before)
        searches |= float_forms(f"{DIFFERENCES}: change at {site}, round 1", layers)
    traces = Traces(searches)
    places = [federation.kits["localhost"], federation.folder / "localhost.log", home / "server", kit, folder]
    return Watched(
        on_disk=traces.shares_in(places),
        on_the_wire=traces.shares_in([frames]),
        envelopes=envelopes,
        results=folder / "results",
        said=said,
        processes=tuple(sorted(file.name.partition("-")[0] for file in frames.iterdir())),
    )


def those(shares: Mapping[str, float], *words: str) -> dict[str, float]:
    return {name: share for name, share in shares.items() if all(word in name for word in words)}


@pytest.mark.federation
def test_of_an_encrypted_run_no_weight_and_no_change_of_one_reaches_the_server(watched: Watched):
    for shares in (those(watched.on_disk, SECRET), those(watched.on_the_wire, SECRET)):
        assert len(shares) == 2 * 3 + 3 * (2 * 6 + 3)  # means; sites: two rounds in six forms, and changes
        assert set(shares.values()) == {0.0}


@pytest.mark.federation
def test_of_plain_runs_the_same_search_finds_them(watched: Watched):
    assert watched.processes.count("server_train") == 1
    assert watched.processes.count("runner_process") == 3  # one for each job
    for words in ((PLAIN, "round", "float32"), (DIFFERENCES, "float32")):
        found = those(watched.on_the_wire, *words)
        found = {name: share for name, share in found.items() if words[0] == DIFFERENCES or "change" not in name}
        assert len(found) == (3 if words[0] == DIFFERENCES else 2 + 3 * 2)
        assert min(found.values()) > 0.98  # few lie across two frames
    assert min(those(watched.on_disk, PLAIN, "mean", "float32").values()) == 1


@pytest.mark.federation
def test_the_key_passes_the_server_sealed_and_in_no_other_form(watched: Watched):
    assert set(watched.envelopes) == {"hospital-a", "hospital-b", "hospital-c"}
    assert watched.on_the_wire["envelopes"] == 1
    for shares in (watched.on_disk, watched.on_the_wire):
        assert shares["key"] == shares["mark key"] == 0


@pytest.mark.federation
def test_who_fetches_an_encrypted_run_gets_scores_and_is_told_where_the_models_are(watched: Watched):
    assert "the models are at the sites, in their nnUNet_results: the server cannot read them" in watched.said
    assert (watched.results / "metrics.csv").is_file()
    assert not [file for file in watched.results.rglob("*") if file.suffix in (".npz", ".pth")]


@pytest.mark.slow
@pytest.mark.federation
@pytest.mark.parametrize("victim", ["hospital-b", "localhost"])
def test_after_a_kill_in_round_two_the_run_goes_on_with_its_key_to_the_same_weights(
    federation: LocalFederation, secret_run: tuple[AggregationKey, dict[str, Any]], tmp_path: Path, victim: str
):
    name, home, sites = f"killed_{victim}", federation.home, federation.sites
    job = tiny_job(tmp_path, name, training=ENCRYPTED, encryption=EncryptionConfig())
    with submitted(federation, job, "--retry", "2") as submission:
        wait_while_running(submission, lambda: all(trainings(home, site, name) == 2 for site in sites))
        if victim == "localhost":
            federation.stop(victim)
            federation.start(victim)
        else:
            federation.job_process(victim).kill()
        server = home / "server" / "runs" / name
        assert RunHistory.load(server).rounds_done == 1
        key = read_json(server / "encryption.json")["key"]
    assert read_json(server / "encryption.json")["key"] == key != secret_run[0].id
    assert [trainings(home, site, name) for site in sites] == [3, 3, 3]
    for site in sites:
        resumed, whole = final_weights(home, site, name), final_weights(home, site, SECRET)
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[layer], whole[layer]) for layer in whole)


def trainings(home: Path, site: str, name: str) -> int:
    """Rounds that a site has begun to train."""
    log = home / site / "runs" / name / "nnunet.log"
    return log.read_bytes().count(b"command: train\n") if log.exists() else 0


def final_weights(home: Path, site: str, name: str) -> dict[str, torch.Tensor]:
    """Of the model that a site ends with: the last mean."""
    (file,) = (home / site / "runs" / name / "nnUNet_results").rglob("checkpoint_final.pth")
    return read_weights(file)


@pytest.mark.parametrize("pack_it", [False, True])
def test_the_search_finds_a_sequence_at_any_place_and_in_archives(tmp_path: Path, pack_it: bool):
    random = np.random.default_rng(1)
    content, sequences = random.bytes(1 << 20), [random.bytes(number) for number in range(4, 260, 7)]
    for place, sequence in enumerate(sequences):
        start = 20_011 * place
        content = content[:start] + sequence + content[start + len(sequence) :]
    if pack_it:
        with zipfile.ZipFile(tmp_path / "archive", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inner", content)
    else:
        (tmp_path / "file").write_bytes(content)
    searches = {"there": sequences, "not": [sequence[:-1] + bytes([sequence[-1] ^ 1]) for sequence in sequences]}
    assert Traces(searches).shares_in([tmp_path]) == {"there": 1, "not": 0}
