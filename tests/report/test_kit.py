from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from nnunet_flare.cli import main
from nnunet_flare.errors import ConfigError
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.provision.kit import StartupKit
from nnunet_flare.provision.manifest import SITE, PolicyManifest
from nnunet_flare.report import connection
from nnunet_flare.report.doctor import FAIL, OK, WARN, Check, doctor_text
from nnunet_flare.report.kit import check_kit, diagnose_kit

if TYPE_CHECKING:
    from local_federation import LocalFederation

HOSPITAL, SERVER, LEAD = "hospital-a", "localhost", "lead@example.org"
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> LocalFederation:
    """Provisioned kits; nothing runs."""
    from local_federation import LocalFederation

    federation = LocalFederation(tmp_path_factory.mktemp("project"))
    federation.provision()
    return federation


@pytest.fixture(autouse=True)
def kept_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock a time service keeps."""
    monkeypatch.setattr(connection, "_is_left_alone", lambda: False)


@pytest.fixture
def hospital(project: LocalFederation, tmp_path: Path) -> Path:
    return shutil.copytree(project.kits[HOSPITAL], tmp_path / HOSPITAL)


@pytest.fixture
def server(project: LocalFederation, tmp_path: Path) -> Path:
    return shutil.copytree(project.kits[SERVER], tmp_path / SERVER)


@pytest.fixture
def lead(project: LocalFederation, tmp_path: Path) -> Path:
    return shutil.copytree(project.kits[LEAD], tmp_path / LEAD)


@contextmanager
def listening(kit: Path, port: int, speak: Callable[[socket.socket], None] | None = None) -> Iterator[None]:
    """Something on the port: a server with the certificate in ``kit``, as gRPC does TLS, or what ``speak`` does."""
    listener = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        while True:
            try:
                guest, _ = listener.accept()
            except OSError:
                return
            with guest:
                try:
                    (speak or greet)(guest)
                except OSError:
                    continue

    def greet(guest: socket.socket) -> None:
        startup = kit / "startup"
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=startup / "rootCA.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(startup / "server.crt", startup / "server.key")
        with context.wrap_socket(guest, server_side=True) as channel:
            channel.sendall(b"HTTP/2")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def certify(
    project: LocalFederation, kit: Path, *, start: timedelta = -DAY, end: timedelta = 90 * DAY, **subject: str
) -> None:
    """Replace the certificate of a kit with one of the project's CA for the same key, with other dates or names."""
    state = json.loads((project.folder / "kits" / project.project["name"] / "state" / "cert.json").read_text())
    ca = x509.load_pem_x509_certificate(state["root_cert"].encode())
    ca_key = serialization.load_pem_private_key(state["root_pri_key"].encode(), password=None)
    assert isinstance(ca_key, rsa.RSAPrivateKey)
    file = StartupKit.read(kit).certificate_file
    old = x509.load_pem_x509_certificate(file.read_bytes())
    names = {NameOID.COMMON_NAME: subject.get("name"), NameOID.UNSTRUCTURED_NAME: subject.get("role")}
    attributes = [x509.NameAttribute(item.oid, names.get(item.oid) or item.value) for item in old.subject]
    extension = old.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    now = datetime.now(UTC)
    new = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(attributes))
        .issuer_name(ca.subject)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + start)
        .not_valid_after(now + end)
        .add_extension(extension.value, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    file.write_bytes(new.public_bytes(serialization.Encoding.PEM))


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rows(kit: Path) -> dict[str, Check]:
    return {check.name: check for check in check_kit(StartupKit.read(kit))}


def failed(kit: Path) -> list[str]:
    return [check.name for check in rows(kit).values() if check.status == FAIL]


def port_of(kit: Path) -> int:
    return StartupKit.read(kit).ports[0]


def test_a_sound_hospital_is_told_what_it_has_and_nothing_is_written(hospital, server, project):
    before = {file: file.stat().st_mtime_ns for file in hospital.rglob("*")}
    with listening(server, port_of(hospital)):
        checks = rows(hospital)
    assert {check.status for check in checks.values()} == {OK}
    end = (datetime.now(UTC) + 360 * DAY).date()
    port = port_of(hospital)
    assert checks["kit"].seen == f"of the hospital hospital-a, for the server localhost, port {port}"
    assert checks["certificate"].seen == "name hospital-a, org hospital_a; signed by the CA nnunet_flare"
    assert f"to {end}" in checks["certificate dates"].seen
    assert f"to {end}" in checks["server certificate dates"].seen
    assert checks["server"].seen == f"localhost:{port} proved to be localhost, and accepted this kit's certificate"
    assert checks["policy files"].seen.endswith("files as signed by the project")
    assert checks["allow list"].seen == "BFVDecryptFilter, BFVEncryptFilter, NNUNetExecutor; enforced"
    assert checks["privacy scope"].seen == "nnunet_flare, default_scope nnunet_flare; encryption not required"
    assert checks["FLARE"].seen == "no process of this kit on this machine"
    assert {file: file.stat().st_mtime_ns for file in hospital.rglob("*")} == before


def test_a_peer_is_told_the_fingerprint_that_openssl_prints(hospital):
    command = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", str(hospital / "startup" / "client.crt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().partition("=")[2]
    seen = rows(hospital)["fingerprint"].seen
    assert seen == printed.replace(":", "").lower()
    assert SiteSettings(site="another", peers={HOSPITAL: seen}).peers == {HOSPITAL: seen}
    assert seen in doctor_text(list(check_kit(StartupKit.read(hospital))))  # on one line


def test_a_site_that_requires_encryption_is_told_so(hospital, capsys):
    assert main(["policy", "install", str(hospital), "--require-encryption"]) == 0
    assert rows(hospital)["privacy scope"].seen.endswith("; encryption required")
    assert "privacy scope" not in failed(hospital)


@pytest.mark.parametrize("side", ["task_data_filters", "task_result_filters"])
def test_encryption_that_is_not_where_it_belongs_fails(hospital, side, capsys):
    main(["policy", "install", str(hospital), "--require-encryption"])
    other = {"path": "a.Filter", "args": {}}

    def misplace(privacy: dict[str, Any]) -> None:
        filters = privacy["scopes"][0][side]
        filters.insert(0 if side == "task_data_filters" else 1, other)

    edit(hospital / "local" / "privacy.json", misplace)
    check = rows(hospital)["privacy scope"]
    assert (check.status, check.seen.partition("; ")[2]) == (
        FAIL,
        "the filters of encryption are not where a policy has them",
    )
    main(["policy", "install", str(hospital)])
    assert rows(hospital)["privacy scope"].status == OK


def test_a_server_need_not_run_yet(server):
    checks = rows(server)
    assert {check.status for check in checks.values()} == {OK}
    assert [check.seen for name, check in checks.items() if name.startswith("port")] == ["free", "free"]
    assert checks["storage"].seen == "storage/jobs, storage/snapshots"


def test_a_user_is_told_the_role(lead, server):
    with listening(server, port_of(lead)):
        checks = rows(lead)
    assert {check.status for check in checks.values()} == {OK}
    assert checks["role"].seen.startswith("lead: ")
    assert "submit_job" in checks["role"].seen
    assert "byoc" not in checks["role"].seen
    assert "allow list" not in checks


@pytest.mark.parametrize(("days", "status"), [(-1, FAIL), (29, WARN), (31, OK)])
def test_a_certificate_that_ended_fails_and_one_about_to_end_warns(hospital, project, days, status):
    certify(project, hospital, start=-100 * DAY, end=days * DAY)
    check = rows(hospital)["certificate dates"]
    assert check.status == status
    assert f"to {(datetime.now(UTC) + days * DAY).date()}" in check.seen


def test_the_certificate_of_another_key_fails(hospital, project):
    shutil.copy(project.kits["hospital-b"] / "startup" / "client.key", hospital / "startup" / "client.key")
    checks = rows(hospital)
    assert checks["certificate"].seen == "client.crt does not belong to client.key"
    assert checks["server"].status == WARN
    assert "not tried" in checks["server"].seen


def test_the_certificate_of_another_site_fails(hospital, project):
    for name in ("client.crt", "client.key"):
        shutil.copy(project.kits["hospital-b"] / "startup" / name, hospital / "startup" / name)
    assert rows(hospital)["certificate"].seen == "is that of hospital-b, the kit that of hospital-a"


def test_the_certificate_of_another_ca_fails(hospital, other_project):
    shutil.copy(other_project.kits[HOSPITAL] / "startup" / "rootCA.pem", hospital / "startup" / "rootCA.pem")
    checks = rows(hospital)
    assert checks["certificate"].seen == "client.crt is not signed by rootCA.pem"
    assert checks["policy files"].status == FAIL


def test_a_certificate_that_is_none_fails(hospital):
    (hospital / "startup" / "client.crt").write_text("nothing")
    assert rows(hospital)["certificate"].status == FAIL


def test_a_key_that_others_may_read_fails(hospital):
    (hospital / "startup" / "client.key").chmod(0o640)
    check = rows(hospital)["key file"]
    assert (check.status, check.seen[:20]) == (FAIL, "client.key, mode 640")
    assert check.remedy.startswith("chmod 600 startup/client.key")


@pytest.fixture(scope="module")
def other_project(tmp_path_factory: pytest.TempPathFactory) -> LocalFederation:
    from local_federation import LocalFederation

    federation = LocalFederation(tmp_path_factory.mktemp("other_project"))
    federation.provision()
    return federation


def test_a_host_without_address_and_a_closed_port_are_told_apart(hospital):
    check = rows(hospital)["server"]
    assert check.status == FAIL
    assert "cannot be reached" in check.seen
    assert "firewall" in check.remedy
    start = hospital / "startup" / "fed_client.json"
    edit(start, lambda content: content["servers"][0]["service"].update(target="no-such-host.invalid:8002"))
    assert rows(hospital)["server"].seen == "no-such-host.invalid:8002 has no address"


def test_the_server_of_another_ca_is_not_believed(hospital, other_project):
    with listening(other_project.kits[SERVER], port_of(hospital)):
        check = rows(hospital)["server"]
    assert check.status == FAIL
    assert "is not the server that this kit is made for" in check.seen


def test_a_participant_of_the_project_cannot_pass_for_the_server(hospital, server, project):
    for end in ("crt", "key"):
        shutil.copy(project.kits["hospital-b"] / "startup" / f"client.{end}", server / "startup" / f"server.{end}")
    with listening(server, port_of(hospital)):
        assert "Hostname mismatch" in rows(hospital)["server"].seen


def test_a_server_of_another_name_at_the_same_host_fails(hospital, server, project):
    certify(project, server, name="another")
    with listening(server, port_of(hospital)):
        assert rows(hospital)["server"].seen.endswith("is another, this kit is made for localhost")


def test_a_server_that_refuses_this_kit_fails(hospital, server, project):
    certify(project, hospital, start=-2 * DAY, end=-DAY)
    with listening(server, port_of(hospital)):
        check = rows(hospital)["server"]
    assert check.status == FAIL
    assert "refuses this kit" in check.seen


def test_something_without_tls_at_the_port_fails(hospital):
    with listening(hospital, port_of(hospital), lambda guest: guest.sendall(b"220 mail.example.org\r\n")):
        assert "speaks no TLS" in rows(hospital)["server"].seen


def test_the_server_s_own_certificate_is_watched(hospital, server, project):
    certify(project, server, start=-2 * DAY, end=-DAY)
    with listening(server, port_of(hospital)):
        checks = rows(hospital)
    assert checks["server"].status == OK
    assert checks["server certificate dates"].status == FAIL
    assert "coordinator" in checks["server certificate dates"].remedy


def test_a_certificate_from_the_future_tells_a_wrong_clock(hospital, server, project):
    certify(project, server, start=2 * DAY)
    with listening(server, port_of(hospital)):
        check = rows(hospital)["clock"]
    assert check.status == FAIL
    assert "the server's certificate starts at" in check.seen


def test_a_clock_that_no_service_keeps_warns(hospital, monkeypatch):
    monkeypatch.setattr(connection, "_is_left_alone", lambda: True)
    assert rows(hospital)["clock"].status == WARN


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize(("state", "left_alone"), [(0, False), (5, True)])
def test_the_kernel_is_asked_whether_a_service_keeps_its_clock(monkeypatch, state, left_alone):
    monkeypatch.undo()
    asked = []

    class Kernel:
        def adjtimex(self, question) -> int:
            asked.append(bytes(question))
            return state

    monkeypatch.setattr("ctypes.CDLL", lambda _: Kernel())
    assert connection._is_left_alone() is left_alone
    assert asked == [bytes(256)]


def test_the_servers_ports_are_free_or_its_own_or_taken(server):
    port, admin_port = StartupKit.read(server).ports
    with listening(server, port), listening(server, admin_port, lambda guest: guest.sendall(b"220 mail\r\n")):
        checks = rows(server)
    assert checks[f"port {port}"].seen == "in use by this server"
    assert checks[f"port {admin_port}"].status == WARN
    assert "not by the server of this kit" in checks[f"port {admin_port}"].seen


def grants_all(content: dict[str, Any]) -> None:
    content["permissions"]["lead"] = "any"


def adds_scope(content: dict[str, Any]) -> None:
    content["scopes"].append(content["scopes"][0] | {"name": "open"})


FAULTS = {
    "class": ("resources.json", lambda c: c["class_allow_list"].append("nvflare."), "allow list", "nvflare."),
    "every class": ("resources.json", lambda c: c["class_allow_list"].append("*"), "allow list", "*"),
    "no class": ("resources.json", lambda c: c["class_allow_list"].clear(), "allow list", "lacks"),
    "mode": ("resources.json", lambda c: c.update(class_list_enforcement_mode="warn"), "allow list", "is warn"),
    "list gone": ("resources.json", lambda c: c.pop("class_allow_list"), "allow list", "class_allow_list"),
    "streaming": ("resources.json", lambda c: c.update(allow_log_streaming=True), "log streaming", "not false"),
    "streaming unsaid": ("resources.json", lambda c: c.pop("allow_log_streaming"), "log streaming", "not false"),
    "streamer": (
        "resources.json",
        lambda c: c["components"].append({"id": "s", "path": "nvflare.app_common.logging.site_log_streamer.S"}),
        "log streaming",
        "component s",
    ),
    "guard": ("resources.json", lambda c: c["components"].pop(0), "policy guard", "PolicyGuard is missing"),
    "gate": ("resources.json", lambda c: c["components"].pop(1), "policy guard", "RequestGate is missing"),
    "validator": (
        "resources.json",
        lambda c: c.pop("app_validator"),
        "policy guard",
        "ApplicationValidator is missing",
    ),
    "validator of the server": (
        "resources.json",
        lambda c: c["app_validator"]["args"].update(server=True),
        "policy guard",
        "ApplicationValidator is missing or altered",
    ),
    "byoc": ("authorization.json", lambda c: c["permissions"]["lead"].update(byoc="any"), "code from outside", "lead"),
    "byoc to one": (
        "authorization.json",
        lambda c: c["permissions"]["lead"].update(byoc="n:lead@example.org"),
        "code from outside",
        "lead",
    ),
    "byoc in capitals": (
        "authorization.json",
        lambda c: c["permissions"]["lead"].update({"byoc": "none", "BYOC ": "ANY"}),
        "code from outside",
        "lead",
    ),
    "everything": ("authorization.json", grants_all, "code from outside", "lead"),
    "no roles": ("authorization.json", lambda c: c.pop("permissions"), "code from outside", "missing permissions"),
    "second scope": ("privacy.json", adds_scope, "privacy scope", "2 scopes"),
    "no scope": ("privacy.json", lambda c: c["scopes"].clear(), "privacy scope", "0 scopes"),
    "no default scope": ("privacy.json", lambda c: c.pop("default_scope"), "privacy scope", "None"),
}


@pytest.mark.parametrize(("file", "change", "name", "seen"), FAULTS.values(), ids=FAULTS)
def test_a_policy_that_is_not_ours_fails_in_its_row_and_in_the_manifest(hospital, file, change, name, seen):
    edit(hospital / "local" / file, change)
    assert set(failed(hospital)) == {"server", "policy files", name}
    check = rows(hospital)[name]
    assert seen in check.seen
    assert check.remedy
    assert f"local/{file} was changed" in rows(hospital)["policy files"].seen


@pytest.mark.parametrize("file", ["privacy.json", "policy.json", "policy.sig"])
def test_a_missing_policy_file_fails(hospital, file):
    (hospital / "local" / file).unlink()
    assert "policy files" in failed(hospital)
    assert ("privacy scope" in failed(hospital)) == (file == "privacy.json")


def test_what_flare_falls_back_to_is_what_is_checked(hospital):
    """``nvflare deploy prepare`` leaves ``resources.json.default`` alone."""
    (hospital / "local" / "resources.json").unlink()
    PolicyManifest.write(hospital)
    assert failed(hospital) == ["server"]


def test_plain_text_fails(hospital):
    edit(hospital / "startup" / "fed_client.json", lambda c: c["client"].update(connection_security="clear"))
    assert rows(hospital)["connection security"].status == FAIL


@pytest.mark.parametrize("storage", ["jobs", "snapshots"])
def test_storage_that_a_restart_deletes_fails(server, storage):
    def change(resources: dict[str, Any]) -> None:
        if storage == "jobs":
            manager = next(item for item in resources["components"] if item["id"] == "job_manager")
            manager["args"]["uri_root"] = "/tmp/nvflare/jobs"
        else:
            resources["snapshot_persistor"]["args"]["storage"]["args"] = {"root_dir": "/tmp/nvflare/snapshots"}

    edit(server / "local" / "resources.json", change)
    assert rows(server)["storage"].seen == f"/tmp/nvflare/{storage}: lost at a restart"


def test_a_volume_of_a_container_is_no_storage_that_a_restart_deletes(server):
    """``nvflare deploy prepare`` names its place in the container."""

    def change(resources: dict[str, Any]) -> None:
        resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = "/var/tmp/nvflare/workspace/storage"

    edit(server / "local" / "resources.json", change)
    assert rows(server)["storage"].status == OK


def test_a_role_that_no_site_knows_fails(lead, project):
    certify(project, lead, role="super")
    assert rows(lead)["role"].seen == "super: no site gives it any right"


def test_a_running_flare_is_found_by_its_kit(hospital):
    arguments = ["nvflare.private.fed.app.client.client_train", "-m", str(hospital)]
    program = [sys.executable, "-c", "print(flush=True); input()", *arguments]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seen = rows(hospital)["FLARE"].seen
        process.communicate(b"\n")
    assert seen == f"runs, process {process.pid}"


def test_wrong_site_settings_are_a_row_beside_the_others(hospital):
    (hospital / "local" / "nnunet_flare.json").write_text('{"datasets": "demo"}')
    checks = {check.name: check for check in diagnose_kit(hospital)}
    assert checks["site settings"].status == FAIL
    assert "datasets" in checks["site settings"].seen
    assert "certificate" in checks


def test_a_folder_that_is_no_kit_is_an_error(tmp_path, capsys):
    assert main(["doctor", "--kit", str(tmp_path)]) == 1
    assert "expected one of fed_server.json, fed_client.json, fed_admin.json" in capsys.readouterr().err


def test_a_start_file_that_flare_did_not_write_is_an_error(hospital):
    edit(hospital / "startup" / "fed_client.json", lambda content: content["servers"].clear())
    with pytest.raises(ConfigError, match="fed_client"):
        StartupKit.read(hospital)


def test_a_session_is_opened_with_the_kit_of_a_person_only(lead, hospital):
    assert StartupKit.read_user(lead).name == LEAD
    with pytest.raises(ConfigError, match="expected the kit of a user, found that of the hospital hospital-a"):
        StartupKit.read_user(hospital)


def test_installing_the_policy_makes_a_plain_kit_of_flare_sound(tmp_path, capsys):
    from local_federation import LocalFederation

    plain = LocalFederation(tmp_path)
    plain.project["builders"] = [item for item in plain.project["builders"] if "SitePolicy" not in item["path"]]
    plain.provision()
    policy = ["policy files", "policy guard", "allow list", "code from outside", "log streaming", "privacy scope"]
    assert failed(plain.kits[SERVER]) == [*policy, "storage"]
    assert failed(plain.kits[HOSPITAL]) == ["server", *policy]
    for name in (SERVER, HOSPITAL):
        assert main(["policy", "install", str(plain.kits[name])]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert {"signed by the site:", "local/resources.json", "local/privacy.json"} <= set(printed)
    assert failed(plain.kits[SERVER]) == []
    assert failed(plain.kits[HOSPITAL]) == ["server"]


def test_installing_the_policy_again_keeps_the_filters_that_it_has(hospital, capsys):
    noise = {"path": "nnunet_flare.privacy.Noise", "args": {"scale": 1}, "direction": "out"}
    edit(hospital / "local" / "privacy.json", lambda privacy: privacy["scopes"][0]["task_result_filters"].append(noise))
    assert main(["policy", "install", str(hospital)]) == 0
    privacy = json.loads((hospital / "local" / "privacy.json").read_text())
    assert privacy["scopes"][0]["task_result_filters"] == [noise]
    edit(hospital / "local" / "privacy.json", lambda privacy: privacy["scopes"].append({"name": "public"}))
    assert main(["policy", "install", str(hospital)]) == 1
    assert "privacy.json: expected one scope, found 2 scopes" in capsys.readouterr().err


def test_a_wanted_change_is_recorded_and_the_doctor_says_by_whom(hospital, capsys):
    edit(hospital / "local" / "resources.json", lambda content: content["client"].update(retry_timeout=60))
    assert "policy files" in failed(hospital)
    assert main(["policy", "record", str(hospital)]) == 0
    assert capsys.readouterr().out.startswith("signed by the site:\n")
    check = rows(hospital)["policy files"]
    assert check.status == OK
    assert check.seen.endswith("files as signed by the site: made or changed here, after provisioning")
    assert PolicyManifest.check(hospital).signer == SITE


@pytest.mark.parametrize("action", ["install", "record"])
def test_a_user_has_no_policy(lead, action, capsys):
    before = sorted(lead.rglob("*"))
    assert main(["policy", action, str(lead)]) == 1
    assert "found that of the user lead@example.org" in capsys.readouterr().err
    assert sorted(lead.rglob("*")) == before


@pytest.mark.federation
def test_every_kit_of_a_running_federation_is_ready(federation, tmp_path, capsys):
    """FLARE's own server, over gRPC: it accepts the kits, and refuses one whose certificate has ended."""
    for name in (HOSPITAL, SERVER, LEAD):
        status = main(["doctor", "--kit", str(federation.kits[name]), "--dataset", "demo"])
        text = capsys.readouterr().out
        assert status == 0, text
        assert "ready: 0 failed" in text
        if name == LEAD:
            continue
        assert re.search(r"FLARE +runs, process \d+", text)
    ended = shutil.copytree(federation.kits[HOSPITAL], tmp_path / HOSPITAL)
    certify(federation, ended, start=-2 * DAY, end=-DAY)
    assert "refuses this kit" in rows(ended)["server"].seen
