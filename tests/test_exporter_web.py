"""TLS and basic auth of the stand-alone exporter: Python's own client, and a real Prometheus."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import json
import logging
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import bcrypt
import promtool
import pytest
import yaml
from boards import FakeWorker
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from serving import eventually, free_port

from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.exporter import Exporter
from moe_monitor.export.webconfig import WebConfig, WebConfigError

PASSWORD = "päss wörd:with colon"


def certificate(folder: Path, name: str = "server", issuer=None):
    """A self-signed certificate for 127.0.0.1, or one that ``issuer`` (key, certificate) signs."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[1].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), True)
        .sign(key if issuer is None else issuer[0], hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / f"{name}.crt").write_bytes(made.public_bytes(pem))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return key, made


def hashed(password: str) -> str:
    """As `htpasswd -B` prints it: Apache's prefix, a cheap cost for tests."""
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode().replace("$2b$", "$2y$")


@pytest.fixture
def config(tmp_path):
    """A web configuration of the given entries; TLS files lie beside it."""
    certificate(tmp_path)

    def write(**entries):
        path = tmp_path / "web.yml"
        path.write_text(yaml.safe_dump(entries))
        return path

    return write


TLS = {"cert_file": "server.crt", "key_file": "server.key"}


@pytest.fixture
def serve(tmp_path):
    started = []

    def start(path):
        exporter = Exporter(MoeCollector(tmp_path / "run"), "127.0.0.1", 0, WebConfig(path))
        exporter.start()
        started.append(exporter)
        return exporter

    with FakeWorker(tmp_path / "run"):
        yield start
        for exporter in started:
            exporter.stop()


def get(url, *, ca=None, user=None, password=PASSWORD, own=None):
    request = urllib.request.Request(url)
    if user is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    context = None
    if ca is not None:
        context = ssl.create_default_context(cafile=str(ca))
        if own is not None:
            context.load_cert_chain(own.with_suffix(".crt"), own.with_suffix(".key"))
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_over_tls_with_its_certificate_and_not_otherwise(config, serve, tmp_path):
    exporter = serve(config(tls_server_config=TLS))
    assert exporter.url.startswith("https://127.0.0.1:")
    status, body = get(exporter.url + "/metrics", ca=tmp_path / "server.crt")
    assert status == 200
    assert b"moe_monitor_active{" in body
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        get(exporter.url + "/metrics", ca=ssl.get_default_verify_paths().cafile)
    with pytest.raises((OSError, ValueError)):  # no plain HTTP beside it
        get(exporter.url.replace("https", "http") + "/metrics")


def test_old_tls_is_refused(config, serve, tmp_path):
    exporter = serve(config(tls_server_config=TLS | {"min_version": "TLS13"}))
    context = ssl.create_default_context(cafile=str(tmp_path / "server.crt"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection((exporter.server_name, exporter.server_port), timeout=10) as plain,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_a_client_that_shakes_no_hands_holds_up_nobody(config, serve, tmp_path):
    exporter = serve(config(tls_server_config=TLS))
    silent = [socket.create_connection((exporter.server_name, exporter.server_port)) for _ in range(20)]
    started = time.monotonic()
    assert get(exporter.url + "/-/healthy", ca=tmp_path / "server.crt") == (200, b"ok\n")
    assert time.monotonic() - started < 5
    for connection in silent:
        connection.close()


def test_clients_must_have_a_certificate_where_asked_for(config, serve, tmp_path):
    authority = certificate(tmp_path, "authority")
    certificate(tmp_path, "friend", issuer=authority)
    certificate(tmp_path, "stranger")
    entries = TLS | {"client_ca_file": "authority.crt", "client_auth_type": "RequireAndVerifyClientCert"}
    exporter = serve(config(tls_server_config=entries))
    ca = tmp_path / "server.crt"
    assert get(exporter.url + "/-/healthy", ca=ca, own=tmp_path / "friend")[0] == 200
    for own in (None, tmp_path / "stranger"):
        with pytest.raises(OSError):
            get(exporter.url + "/-/healthy", ca=ca, own=own)


@pytest.mark.parametrize("path", ["/", "/metrics", "/requests", "/-/healthy", "/nothing"])
def test_nothing_is_answered_without_the_password(config, serve, path):
    exporter = serve(config(basic_auth_users={"prometheus": hashed(PASSWORD)}))
    for user, password in ((None, ""), ("prometheus", "wrong"), ("prometheus", ""), ("nobody", PASSWORD), ("", "")):
        assert get(exporter.url + path, user=user, password=password) == (401, b"Unauthorized\n")
    assert get(exporter.url + path, user="prometheus")[0] == (404 if path == "/nothing" else 200)


@pytest.mark.parametrize(
    "header",
    ["Basic", "Basic !!!", "Basic " + "A" * 60_000, "Bearer x", "Basic bm9jb2xvbg==", "Basic cHJvbWV0aGV1czoA/w=="],
)
def test_rude_credentials_are_refused(config, header):
    assert not WebConfig(config(basic_auth_users={"prometheus": hashed(PASSWORD)})).allows(header)


def test_the_right_password_is_slow_only_once(config):
    """bcrypt takes a tenth of a second at its usual cost, a scrape should not."""
    slow = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()
    web = WebConfig(config(basic_auth_users={"prometheus": slow}))
    header = "Basic " + base64.b64encode(f"prometheus:{PASSWORD}".encode()).decode()
    wrong = "Basic " + base64.b64encode(b"prometheus:wrong").decode()
    took = []
    for value in (header, header, wrong, wrong):
        started = time.perf_counter()
        assert web.allows(value) is (value == header)
        took.append(time.perf_counter() - started)
    again, *others = took[1], took[0], took[2], took[3]
    assert again < min(others) / 5  # and guesses stay slow


def test_users_and_certificates_are_read_again(config, serve, tmp_path, caplog):
    path = config(tls_server_config=TLS, basic_auth_users={"prometheus": hashed(PASSWORD)})
    exporter = serve(path)

    def ask(password=PASSWORD):
        return get(exporter.url + "/-/healthy", ca=tmp_path / "server.crt", user="prometheus", password=password)[0]

    assert ask() == 200
    certificate(tmp_path)  # renewed: the old one is not trusted any more
    config(tls_server_config=TLS, basic_auth_users={"prometheus": hashed("new")})
    assert (ask(), ask("new")) == (401, 200)
    with caplog.at_level(logging.WARNING):
        path.write_text("{")
        assert (ask(), ask("new")) == (401, 200)
        path.unlink()
        assert ask("new") == 200
    assert caplog.text.count("stays as it was") == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "is not YAML"),
        ("- a", "the file must be a mapping"),
        ("tls_server_config: {cert_file: server.crt}", "needs cert_file and key_file"),
        ("tls_server_config: {cert_file: none.crt, key_file: server.key}", "No such file"),
        ("tls_server_config: {cert_file: server.key, key_file: server.key}", "cannot use"),
        (
            "tls_server_config: {cert_file: server.crt, key_file: server.key, min_version: SSL3}",
            "'SSL3' is not supported",
        ),
        (
            "tls_server_config: {cert_file: server.crt, key_file: server.key, cipher_suites: [x]}",
            "'cipher_suites', which",
        ),
        (
            (
                "tls_server_config: "
                "{cert_file: server.crt, key_file: server.key, client_auth_type: RequireAndVerifyClientCert}"
            ),
            "needs client_ca_file",
        ),
        ("basic_auth_users: {me: secret}", "the password of 'me' is not a bcrypt hash"),
        ("basic_auth_user: {me: x}", "'basic_auth_user', which is not supported"),
        ("http_server_config: {http2: true}", "'http_server_config', which is not supported"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        (None, "cannot read"),
    ],
)
def test_what_cannot_be_used_is_refused_plainly(config, tmp_path, text, words):
    """Above all: an entry without effect would be taken for protection."""
    path = tmp_path / "web.yml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(WebConfigError) as refused:
        WebConfig(path)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_real_prometheus_scrapes_it(config, tmp_path):
    """The command as an operator starts it; one job with the password, one without."""
    path = config(tls_server_config=TLS, basic_auth_users={"prometheus": hashed(PASSWORD)})
    command = [sys.executable, "-m", "moe_monitor.cli.main", "export", "--port", "0", "--dir", str(tmp_path / "run")]
    command += ["--web.config.file", str(path)]
    port = free_port()
    with FakeWorker(tmp_path / "run", tokens=777):
        exporter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes = [exporter]
        try:
            url = exporter.stdout.readline().split()[0]
            assert url.startswith("https://127.0.0.1:")
            job = {
                "scheme": "https",
                "tls_config": {"ca_file": str(tmp_path / "server.crt")},
                "static_configs": [{"targets": [url.split("/")[2]]}],
            }
            auth = {"basic_auth": {"username": "prometheus", "password": PASSWORD}}
            jobs = [{"job_name": "with"} | job | auth, {"job_name": "without"} | job]
            settings = {"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}
            (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(settings))
            start = [promtool.tool("prometheus"), f"--config.file={tmp_path}/prometheus.yml"]
            start += [f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]
            with (tmp_path / "prometheus.log").open("w") as log:
                processes.append(subprocess.Popen(start, stdout=log, stderr=log))

            def ask(query):
                try:
                    status, answer = get(f"http://127.0.0.1:{port}/api/v1/query?query={query}")
                except OSError:
                    return {}
                if status != 200:  # it is starting
                    return {}
                return {r["metric"].get("job"): r["value"][1] for r in json.loads(answer)["data"]["result"]}

            tokens = 'moe_routed_tokens_total{layer="0"}'.replace("{", "%7B").replace("}", "%7D").replace('"', "%22")
            eventually(lambda: ask(tokens) == {"with": "777"}, 30)
            eventually(lambda: ask("up") == {"with": "1", "without": "0"}, 10)
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            codes = [process.wait(20) for process in processes]
            exporter.stdout.close()
    assert codes[0] == 0
