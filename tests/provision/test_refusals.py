"""Whoever and whatever may not take part is refused by real processes, with a reason; what may, passes beside it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from nvflare.fuel.hci.client import file_transfer
from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE

from commands import run
from nnunet_flare.flare.config import EncryptionConfig
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.provision.manifest import SIGNATURE_FILE, PolicyManifest
from nnunet_flare.recipe import FFERecipe

if TYPE_CHECKING:
    from local_federation import LocalFederation
    from nvflare.fuel.flare_api.flare_api import Session

pytestmark = pytest.mark.federation

SERVER, SITE, OTHER_SITE, ABSENT_SITE = "localhost", "hospital-a", "hospital-b", "hospital-c"


def wait_until(holds: Callable[[], bool], patience_s: float = 60) -> None:
    give_up = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.3)


# --- who connects -----------------------------------------------------------------------------------------------------


def replace_certificate(kit: Path, state: Path, *, days: int) -> None:
    """Put the project's CA's certificate for the same name and key in, valid until so many days from now."""
    ca = json.loads(state.read_text())
    issuer = x509.load_pem_x509_certificate(ca["root_cert"].encode())
    key = serialization.load_pem_private_key(ca["root_pri_key"].encode(), password=None)
    file, now = kit / "startup" / "client.crt", datetime.now(UTC)
    before = x509.load_pem_x509_certificate(file.read_bytes())
    builder = x509.CertificateBuilder(
        issuer_name=issuer.subject,
        subject_name=before.subject,
        public_key=before.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=9),
        not_valid_after=now + timedelta(days=days),
    )
    for extension in before.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="module")
def strangers(federation: LocalFederation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    """Kits of one hospital that may not take part, each named by why; they call at the federation's server."""
    from local_federation import LocalFederation

    with LocalFederation(tmp_path_factory.mktemp("strangers")) as strangers:
        strangers.project["participants"][0] |= federation.project["participants"][0]
        strangers.provision()
        foreign = strangers.kits[ABSENT_SITE]
        strangers.kits = {"foreign": foreign}
        state = federation.folder / "kits" / federation.project["name"] / "state" / "cert.json"
        for reason in ("valid", "plain", "mixed", "expired", "tampered", "resigned"):
            kit = strangers.kits[reason] = foreign.parent / reason
            for part in ("startup", "local"):
                shutil.copytree(federation.kits[ABSENT_SITE] / part, kit / part)
        config = strangers.kits["plain"] / "startup" / "fed_client.json"
        config.write_text(config.read_text().replace('"mtls"', '"clear"'))
        PolicyManifest.write(strangers.kits["plain"])  # who calls in plain text follows no policy of ours
        for name in ("client.crt", "client.key"):
            shutil.copy(foreign / "startup" / name, strangers.kits["mixed"] / "startup")
        replace_certificate(strangers.kits["expired"], state, days=-1)
        with (strangers.kits["tampered"] / "local" / "resources.json").open("a") as file:
            file.write(" ")
        (strangers.kits["resigned"] / SIGNATURE_FILE).write_bytes(base64.b64encode(bytes(256)))
        yield strangers


def greet(federation: LocalFederation, kit: Path | None, *, encrypted: bool = True) -> bytes:
    """What the server answers to an HTTP/2 greeting, in the name of the kit's owner or of nobody."""
    context = ssl.create_default_context(cafile=federation.kits[SITE] / "startup" / "rootCA.pem")
    context.set_alpn_protocols(["h2"])
    if kit:
        context.load_cert_chain(kit / "startup" / "client.crt", kit / "startup" / "client.key")
    port = federation.project["participants"][0]["fed_learn_port"]
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("localhost", port), timeout=10))
        if encrypted:
            connection = stack.enter_context(context.wrap_socket(connection, server_hostname="localhost"))
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        return connection.recv(100)


@pytest.mark.parametrize(
    ("stranger", "reason"),
    [
        ("plain text", "WRONG_VERSION_NUMBER"),
        ("nobody", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ("foreign", "CERTIFICATE_VERIFY_FAILED: unable to get local issuer"),
        ("expired", "CERTIFICATE_VERIFY_FAILED: certificate has expired"),
    ],
)
def test_a_connection_without_a_valid_certificate_of_the_project_gets_no_answer(
    federation: LocalFederation, strangers: LocalFederation, stranger: str, reason: str
):
    assert greet(federation, strangers.kits["valid"])
    seen = len(federation.log(SERVER))
    assert not greet(federation, strangers.kits.get(stranger), encrypted=stranger != "plain text")
    wait_until(lambda: reason in federation.log(SERVER)[seen:])


def test_sites_that_may_not_take_part_stay_outside_and_are_told_why(
    federation: LocalFederation, strangers: LocalFederation
):
    ended = {
        "expired": "startup/client.crt: expected a certificate that is valid now",
        "mixed": "startup/client.crt: expected a certificate of the CA in rootCA.pem, found one of another CA",
        "tampered": "local/resources.json was changed",
        "resigned": "expected a record signed by the project, found another signature",
    }
    trying = {"foreign": "CERTIFICATE_VERIFY_FAILED", "plain": "insecure channel"}
    with federation.session("project_admin") as session:
        federation.wait_for_sites(session)
        federation.stop(ABSENT_SITE)
        session.remove_client(ABSENT_SITE)
        seen = len(federation.log(SERVER))
        strangers.start(*ended, *trying)
        try:
            for reason, text in (ended | trying).items():
                wait_until(lambda reason=reason, text=text: text in strangers.log(reason))
            wait_until(lambda: not any(map(strangers.is_alive, ended)))
            wait_until(lambda: "WRONG_VERSION_NUMBER" in federation.log(SERVER)[seen:])
            assert {client.name for client in session.get_system_info().client_info} == {SITE, OTHER_SITE}
        finally:
            strangers.stop(*ended, *trying)
            federation.start(ABSENT_SITE)
        federation.wait_for_sites(session)


def test_a_hospital_that_asks_another_gets_no_answer(federation: LocalFederation, strangers: LocalFederation):
    kit = strangers.kits["curious"] = shutil.copytree(
        strangers.kits["valid"], strangers.kits["valid"].parent / "curious"
    )
    component = {"id": "curious", "path": "curious_site.CuriousSite", "args": {"target": SITE}}
    change_json("local/resources.json", lambda resources: resources["components"].append(component))(kit)
    PolicyManifest.write(kit)
    with federation.session("project_admin") as session:
        federation.wait_for_sites(session)
        federation.stop(ABSENT_SITE)
        session.remove_client(ABSENT_SITE)
        strangers.start(
            "curious", PYTHONPATH=f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        )
        try:
            wait_until(lambda: "answered" in strangers.log("curious"))
            assert f"{SITE} answered None: only the server may ask this site" in strangers.log("curious")
            assert f"refused a request of '{ABSENT_SITE}'" in federation.log(SITE)
        finally:
            strangers.stop("curious")
            session.remove_client(ABSENT_SITE)
            federation.start(ABSENT_SITE)
        federation.wait_for_sites(session)


# --- what a job is ----------------------------------------------------------------------------------------------------

Change = Callable[[Path], object]
"""What turns a job folder of ours into one to refuse."""


def write_job(folder: Path, name: str, *, site: str = SITE, **training: Any) -> Path:
    """A job of ours for one site; it ends after seconds unless told otherwise."""
    settings = {"configuration": "2d", "num_foreground_voxels": 10_000, "stop_after": "fingerprint"} | training
    FFERecipe(name=name, training=TrainingConfig(**settings)).export(str(folder))
    shutil.rmtree(folder / name / "app" / "custom")
    change_meta(deploy_map={"app": ["server", site]})(folder / name)
    return folder / name


def change_json(file: str, change: Callable[[Any], object]) -> Change:
    def apply(job: Path) -> None:
        content = json.loads((job / file).read_text())
        change(content)
        (job / file).write_text(json.dumps(content))

    return apply


def change_meta(**values: Any) -> Change:
    return change_json("meta.json", lambda meta: meta.update(values))


def change_server(change: Callable[[Any], object]) -> Change:
    return change_json("app/config/config_fed_server.json", change)


def change_client(change: Callable[[Any], object]) -> Change:
    return change_json("app/config/config_fed_client.json", change)


def add_files(contents: Mapping[str, str]) -> Change:
    def apply(job: Path) -> None:
        for name, content in contents.items():
            (job / "app" / name).parent.mkdir(exist_ok=True)
            (job / "app" / name).write_text(content)

    return apply


def alter(app: str) -> Change:
    return change_json(f"{app}/config/config_fed_client.json", lambda config: config.update(get_task_timeout=1.0))


def unsign(app: str) -> Change:
    return lambda job: [file.unlink() for file in (job / app).rglob(NVFLARE_SIG_FILE)]


def split_apps(job: Path) -> None:
    """Give the site an app of its own, which the server does not open."""
    shutil.copytree(job / "app", job / "app_of_site")
    change_meta(deploy_map={"app": ["server"], "app_of_site": [SITE]})(job)


FEDAVG = {"id": "c", "path": "nvflare.app_common.workflows.fedavg.FedAvg", "args": {"num_clients": 1}}
SWARM = {"path": "nvflare.app_common.ccwf.swarm_client_ctl.SwarmClientController", "args": {}}
FILTER = {"path": "nvflare.app_common.filters.exclude_vars.ExcludeVars", "args": {}}
PROCESS = {"id": "p", "path": "nnunet_flare.nnunet.process.NNUNetProcess", "args": {}}
DRIVER = {"config/comm_config.json": '{"comm_driver_path": "."}', "config/driver.py": "raise SystemExit"}
CODE = {"custom/code.py": "raise SystemExit"}
IMAGE = {SITE: {"docker": {"image": "elsewhere/image"}}}

REFUSED: dict[str, tuple[Sequence[Change], str]] = {
    "fedavg": ([change_server(lambda c: c.update(workflows=[FEDAVG]))], rf"server: .* found {FEDAVG['path']};"),
    "swarm": (
        [change_client(lambda c: c["executors"].append({"tasks": ["swarm_*"], "executor": SWARM}))],
        rf"{SITE}: .* found {SWARM['path']};",
    ),
    "filter": (
        [change_client(lambda c: c["task_result_filters"].append({"tasks": ["*"], "filters": [FILTER]}))],
        rf"{SITE}: .* found {FILTER['path']};",
    ),
    "own_class": ([change_server(lambda c: c["components"].append(PROCESS))], rf"server: .* found {PROCESS['path']};"),
    "nested_class": (
        [change_server(lambda c: c["workflows"][0]["args"].update(federation=PROCESS))],
        rf"server: .* found {PROCESS['path']};",
    ),
    "code": ([add_files(CODE)], r"server: .* no code \(BYOC\) .* found custom, custom/code.py;"),
    "denied_code": ([add_files(CODE), change_meta(byoc=False)], r"server: .* found custom, custom/code.py;"),
    "driver": ([add_files(DRIVER)], r"server: .* found config/comm_config.json, config/driver.py;"),
    "scope": ([change_meta(scope="public")], r"server: privacy scope 'public' is not allowed"),
    "launcher": ([change_meta(launcher_spec=IMAGE)], rf"{SITE}: .*BYOC not permitted"),
    "resources": ([change_meta(resource_spec=IMAGE)], rf"{SITE}: .*BYOC not permitted"),
}
"""Job -> what is done to it before it is signed, and the reason of its refusal."""

UNTRUE: dict[str, tuple[Change, str]] = {
    "altered": (alter("app"), r"server: .*signature verification"),
    "unsigned": (unsign("app"), r"server: unsigned job rejected"),
    "altered_for_site": (alter("app_of_site"), rf"{SITE}: .*does not pass signature verification"),
    "unsigned_for_site": (unsign("app_of_site"), rf"{SITE}: .*unsigned job rejected"),
}
"""Job -> what is done to it after it was signed, and the reason of its refusal."""


def submit_after_signing(session: Session, job: Path, change: Change) -> str:
    sign = file_transfer.sign_folders
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_transfer, "sign_folders", lambda *args: (sign(*args), change(job)))
        return session.submit_job(str(job))


@pytest.fixture(scope="module")
def records(federation: LocalFederation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The server's record of every job at its end; the server takes one a second, and runs four at a time."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs: dict[str, str] = {}
    ended: dict[str, dict[str, Any]] = {}
    with (
        federation.session("lead") as lead,
        federation.session("project_admin") as admin,
        tampered(federation.kits[OTHER_SITE] / "local" / "privacy.json"),
    ):
        federation.wait_for_sites(lead)
        twice = write_job(folder, "twice", num_rounds=1000, iterations_per_epoch=1, stop_after=None)
        jobs["first"] = lead.submit_job(str(twice))
        try:
            jobs["policy"] = lead.submit_job(str(write_job(folder, "policy", site=OTHER_SITE)))
            wait_until((federation.home / "server" / "runs" / "twice" / "run.json").exists)
            jobs["second"] = lead.submit_job(str(twice))
            for name, (changes, _) in REFUSED.items():
                job = write_job(folder, name)
                for change in changes:
                    change(job)
                jobs[name] = lead.submit_job(str(job))
            for name, (change, _) in UNTRUE.items():
                job = write_job(folder, name)
                split_apps(job)
                jobs[name] = submit_after_signing(lead, job, change)
            job = write_job(folder, "code_of_admin")
            add_files(CODE)(job)
            jobs["code_of_admin"] = admin.submit_job(str(job))
            jobs["good"] = lead.submit_job(str(write_job(folder, "good")))
            for name in [*jobs][1:]:
                ended[name] = admin.wait_for_job(jobs[name], timeout=120, poll_interval=0.5)
        finally:
            lead.abort_job(jobs["first"])
            ended["first"] = lead.wait_for_job(jobs["first"], timeout=120, poll_interval=0.5)
    return ended


@contextlib.contextmanager
def tampered(file: Path) -> Iterator[None]:
    content = file.read_bytes()
    file.write_bytes(content + b" ")
    try:
        yield
    finally:
        file.write_bytes(content)


def refusal(record: Mapping[str, Any]) -> str:
    """Why a job was not run, as its submitter reads it from the server's record."""
    assert record["status"] == "FINISHED:FAILED_TO_RUN"
    return "\n".join(record["job_deploy_detail"])


def server_log(session: Session, job_id: str, folder: Path) -> str:
    """The server's log of a job that failed while it ran, as its submitter fetches it."""
    return (Path(session.download_job_result(job_id, str(folder))) / "workspace" / "log.txt").read_text()


def test_a_job_of_ours_runs(records: dict[str, dict[str, Any]]):
    assert records["good"]["status"] == "FINISHED:COMPLETED"


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_that_is_not_of_ours_is_refused(records: dict[str, dict[str, Any]], name: str):
    assert re.search(REFUSED[name][1], refusal(records[name]))


def test_not_even_the_project_admin_brings_code(records: dict[str, dict[str, Any]]):
    assert re.search(REFUSED["code"][1], refusal(records["code_of_admin"]))


@pytest.mark.parametrize("name", UNTRUE)
def test_a_job_that_was_altered_or_not_signed_is_refused_at_server_and_site(
    records: dict[str, dict[str, Any]], name: str
):
    assert re.search(UNTRUE[name][1], refusal(records[name]))


def test_a_policy_that_is_changed_while_the_site_runs_stops_the_next_job_there(
    federation: LocalFederation, records: dict[str, dict[str, Any]], tmp_path: Path
):
    assert records["policy"]["status"] == "FINISHED:EXECUTION_EXCEPTION"
    with federation.session("lead") as lead:
        log = server_log(lead, records["policy"]["job_id"], tmp_path)
    assert (
        f"{OTHER_SITE}: site policy: expected the policy files as they were installed, found local/privacy.json" in log
    )


def test_two_runs_of_one_name_at_once_are_one_too_many(
    federation: LocalFederation, records: dict[str, dict[str, Any]], tmp_path: Path
):
    assert records["second"]["status"] == "FINISHED:EXECUTION_EXCEPTION"
    with federation.session("lead") as lead:
        log = server_log(lead, records["second"]["job_id"], tmp_path)
    assert "folder of twice: expected a run that nobody else works on" in log
    assert records["first"]["status"] == "FINISHED:ABORTED"  # it was still at work


# --- what a site demands ----------------------------------------------------------------------------------------------


def outcome(session: Session, job_id: str, folder: Path) -> Any:
    """Why a job ended, as its submitter fetches it; None is success."""
    left = Path(session.download_job_result(job_id, str(folder))) / "workspace" / "nnunet_flare" / "outcome.json"
    return json.loads(left.read_text())["error"]


def test_a_site_that_requires_encryption_refuses_a_plain_job_at_its_first_task_and_runs_an_encrypted_one(
    federation: LocalFederation, tmp_path: Path
):
    kit, kept = federation.kits[SITE], tmp_path / "kept"
    plain = write_job(tmp_path, "in_clear_text")
    training = TrainingConfig(configuration="2d", num_foreground_voxels=10_000, stop_after="fingerprint")
    FFERecipe(name="in_cipher_text", training=training, encryption=EncryptionConfig()).export(str(tmp_path))
    encrypted = tmp_path / "in_cipher_text"
    shutil.rmtree(encrypted / "app" / "custom")
    shutil.copytree(kit / "local", kept)
    federation.stop(SITE)
    try:
        told = run("nnunet-flare", "policy", "install", kit, "--require-encryption", folder=tmp_path)
        assert told.startswith("signed by the site:")
        federation.start(SITE)
        refused = federation.run_job(plain)
        accepted = federation.run_job(encrypted)
    finally:
        federation.stop(SITE)
        shutil.rmtree(kit / "local")
        shutil.copytree(kept, kit / "local")
        federation.start(SITE)
        with federation.session() as session:
            federation.wait_for_sites(session)
    assert refused["status"] == "FINISHED:EXECUTION_EXCEPTION"
    with federation.session() as session:
        error = outcome(session, refused["job_id"], tmp_path)
        assert outcome(session, accepted["job_id"], tmp_path) is None
    assert (error["code"], error["site"], error["field"]) == ("encryption", SITE, "job")
    assert error["expected"] == "an encrypted one, as this site's policy says"
    assert not (federation.home / SITE / "runs" / "in_clear_text").exists()
    assert accepted["status"] == "FINISHED:COMPLETED"
    sealed = [
        federation.home / site / "runs" / "in_cipher_text" / "encryption" / "key.json" for site in federation.sites
    ]
    assert all(file.exists() for file in sealed)


# --- who may do what --------------------------------------------------------------------------------------------------

JOB_COMMANDS = ("download_job", "delete_job", "clone_job", "abort_job")
SHELL = (f"ls {SITE}", f"cat {SITE} local/privacy.json", f"tail {SITE} log.txt", "ls server")
REFUSAL = re.compile("not authorized|invalid_request")
OPERATION = (
    "shutdown server",
    f"shutdown client {SITE}",
    f"restart client {SITE}",
    f"remove_client {SITE}",
    "sys_info server",
    f"sys_info client {SITE}",
    "configure_site_log server DEBUG",
)
FORBIDDEN = {
    "lead": (*(f"{command} {{another}}" for command in JOB_COMMANDS), *SHELL, *OPERATION),
    "auditor": ("submit_job {job}", *(f"{command} {{another}}" for command in JOB_COMMANDS), *SHELL, *OPERATION),
    "project_admin": SHELL,
}
"""Role -> commands of FLARE's console; the lead and the server are of one organisation."""


@pytest.mark.parametrize("role", FORBIDDEN)
def test_who_has_not_the_right_is_refused(
    federation: LocalFederation, records: dict[str, dict[str, Any]], tmp_path: Path, role: str
):
    job, another = write_job(tmp_path, "unwanted"), records["code_of_admin"]["job_id"]
    with federation.session(role) as session:
        federation.wait_for_sites(session)
        for command in FORBIDDEN[role]:
            answer = str(session.api.do_command(command.format(job=job, another=another)))
            assert REFUSAL.search(answer), f"{command}: {answer}"
        for command in ("list_jobs", f"get_job_meta {another}", "check_status server"):
            assert not REFUSAL.search(str(session.api.do_command(command)))
    assert all(map(federation.is_alive, (SERVER, SITE)))


def test_a_file_below_the_current_folder_does_not_run_as_part_of_a_command(federation: LocalFederation, tmp_path: Path):
    """Such as the results of a run, in the folder that the lead works in."""
    for name, content in {"comm_config.json": '{"comm_driver_path": "results"}', "ran.py": "open('ran', 'w')"}.items():
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / name).write_text(content)
    command = [sys.executable, "-m", "nnunet_flare.cli", "status", "unknown", "--kit", str(federation.user("lead"))]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "unknown" in result.stdout + result.stderr
    assert not (tmp_path / "ran").exists()
