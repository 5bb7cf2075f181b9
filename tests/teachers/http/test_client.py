"""The HTTP client: each way of failing is told apart, the certificate is verified, the key is shown to nobody."""

from __future__ import annotations

import datetime
import json
import math
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http.chat import parse_chat
from latentforge.teachers.http.client import HttpClient, retry_after, ssl_context
from latentforge.teachers.http.openai import OpenAITeacher
from latentforge.teachers.http.probe import ask
from latentforge.teachers.http.rows import Question
from latentforge.teachers.protocol import TeacherIdentity

KEY = "sk-very-secret-0123456789"
GIVEN_UP = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """Says what its path names."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, str]]

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self.seen.append(dict(self.headers.items()))
        name = self.path.rpartition("/")[2]
        status, body, headers = 200, json.dumps({"said": name}).encode(), {}
        if name.isdigit():
            status = int(name)
            body = json.dumps({"error": {"message": f"no: {self.headers.get('Authorization')} \x1b[31m"}}).encode()
            headers = {"Retry-After": "7"}
        elif name == "longer":
            status, body = 400, b'{"error": {"message": "This model\'s maximum context length is 128 tokens."}}'
        elif name == "elsewhere":
            status, headers = 302, {"Location": f"http://127.0.0.1:{self.server.server_address[1]}/v1/found?key=1"}
        elif name == "html":
            body = b"<html>a proxy's page</html>"
        elif name == "deep":
            body = b"[" * 100_000
        elif name == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            while not GIVEN_UP.wait(0.02):
                try:
                    self.wfile.write(b" ")
                except OSError:
                    break
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) + (10 if name == "cut" else 0)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


def serving(wrap: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """A server on loopback, and the headers of what it was asked."""

    class Quiet(HTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Nothing: a client that does not trust the certificate ends the connection."""

    class Own(Handler):
        seen: list[dict[str, str]] = []  # noqa: RUF012

    server = Quiet(("127.0.0.1", 0), Own)
    if wrap is not None:
        server.socket = wrap.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    GIVEN_UP.clear()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server.server_address[1], Own.seen
    GIVEN_UP.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server() -> Iterator[tuple[int, list[dict[str, str]]]]:
    yield from serving()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("401", "unauthorized"),
        ("403", "unauthorized"),
        ("404", "model-not-found"),
        ("408", "timeout"),
        ("422", "refused-request"),
        ("429", "rate-limited"),
        ("500", "server-error"),
        ("503", "server-error"),
        ("longer", "too-long"),
        ("elsewhere", "refused-request"),
        ("html", "malformed"),
        ("deep", "malformed"),
        ("cut", "cut"),
    ],
)
def test_each_answer_is_told_apart_and_the_key_is_not_shown(
    server: tuple[int, list[dict[str, str]]], path: str, kind: str
) -> None:
    port, seen = server
    client = HttpClient(f"http://127.0.0.1:{port}/v1", key=KEY, timeout=20)
    with pytest.raises(TeacherFailure) as caught:
        client.get(f"/{path}")
    client.close()
    failure = caught.value
    assert failure.kind == kind
    for shown in (str(failure), repr(failure), str(failure.next), repr(client), str(failure.__cause__)):
        assert KEY not in shown
    assert "\x1b" not in str(failure)
    assert failure.retry_after == (7.0 if path.isdigit() else None)
    assert [one.get("Authorization") for one in seen] == [f"Bearer {KEY}"], "asked once; a redirect is not followed"


def test_a_server_that_is_not_there_is_a_connection_and_nothing_was_sent() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = HttpClient(f"http://127.0.0.1:{free.getsockname()[1]}/v1")
        with pytest.raises(TeacherFailure) as caught:
            client.get("/models")
    assert (caught.value.kind, int(caught.value.code)) == ("connection", 6)
    assert "latentforge teacher serve" in str(caught.value.next)
    client.close()


def test_an_answer_that_drips_for_ever_is_a_time_out(server: tuple[int, list[dict[str, str]]]) -> None:
    client = HttpClient(f"http://127.0.0.1:{server[0]}/v1", timeout=0.3)
    with pytest.raises(TeacherFailure) as caught:
        client.get("/drip")
    assert caught.value.kind == "timeout"
    client.close()


def self_signed(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1 that no authority of this machine knows, and a server's context with it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = folder / "key.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, private)
    return file, context


def test_a_certificate_that_nobody_vouches_for_is_refused_and_the_key_stays_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, context = self_signed(tmp_path)
    for port, seen in serving(context):
        client = HttpClient(f"https://127.0.0.1:{port}/v1", key=KEY, timeout=20)
        with pytest.raises(TeacherFailure) as caught:
            client.get("/models")
        assert (caught.value.kind, int(caught.value.code)) == ("tls", 6)
        assert not seen
        client.close()
        # The control: the same server, once its authority is known.
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        client = HttpClient(f"https://127.0.0.1:{port}/v1", key=KEY, timeout=20)
        assert client.get("/models") == {"said": "models"}
        client.close()


def test_certificates_are_always_verified() -> None:
    context = ssl_context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "Sat, 21 Nov 2026 19:00:30 GMT"}, 30.0),
        ({"retry-after": "Sat, 21 Nov 2026 19:00:30 GMT", "date": "Sat, 21 Nov 2026 19:00:20 GMT"}, 10.0),
        ({"retry-after": "Sat, 21 Nov 2026 18:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "٣"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date_by_the_servers_own_clock(
    headers: dict[str, str], seconds: float | None
) -> None:
    at = datetime.datetime(2026, 11, 21, 19, 0, 0, tzinfo=datetime.UTC).timestamp()
    found = retry_after(headers, now=lambda: at)
    assert found == seconds if seconds is None else found == pytest.approx(seconds)


@given(st.text())
def test_any_retry_after_is_a_wait_or_none(value: str) -> None:
    found = retry_after({"retry-after": value}, now=lambda: 0.0)
    assert found is None or found >= 0.0


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/v1",
        "h:8000/v1",
        "http://",
        "http://u:pw@h/v1",
        "http://h/v1?key=pw",
        "http://h:99999/v1",
        "",
        "http://a b/v1",
        "http://h/v1\x01",
    ],
)
def test_an_url_that_cannot_be_meant_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(RefusedError) as caught:
        HttpClient(url)
    assert "pw" not in str(caught.value)


def test_a_key_that_is_not_set_is_refused_by_its_name_before_anything_is_sent(teacher_folder: Path) -> None:
    with pytest.raises(RefusedError, match="'VENICE_API_KEY', and that variable is not set"):
        OpenAITeacher.open("http://127.0.0.1:9/v1", "m", teacher_folder, api_key_env="VENICE_API_KEY", env={})
    for key in ("line\nbreak", " ", f" {KEY}", f"{KEY} "):
        with pytest.raises(RefusedError, match="no header can carry") as refused:
            HttpClient("http://127.0.0.1:9/v1", key=key)
        assert KEY not in str(refused.value)


def test_a_key_that_would_cross_the_network_readable_is_said() -> None:
    identity = TeacherIdentity("served:m", "unstated", "served", "0" * 64)

    def notes(url: str) -> str:
        teacher = OpenAITeacher(HttpClient(url, key=KEY), "m", identity=identity, vocab_size=10)
        teacher.close()
        return " ".join(teacher.notes)

    assert "unencrypted" in notes("http://gx10:8000/v1")
    assert "unencrypted" not in notes("https://gx10:8000/v1") + notes("http://127.0.0.1:8000/v1")
    assert KEY not in notes("http://gx10:8000/v1")


def chat(**changed: Any) -> dict[str, Any]:
    top = [{"token": t, "bytes": list(t.encode()), "logprob": p} for t, p in (("é", -0.4), ("b", -2.0), ("c", -3.0))]
    position = {**top[1], "top_logprobs": top, **changed}
    message = {"role": "assistant", "content": "b"}
    return {"choices": [{"message": message, "finish_reason": "stop", "logprobs": {"content": [position]}}]}


def test_a_chat_answer_is_read_as_bytes_with_its_rest_mass() -> None:
    found = parse_chat(chat(), k=3)
    assert found.text == "b"
    assert [entry.bytes for entry in found.positions[0].top] == ["é".encode(), b"b", b"c"]
    assert found.positions[0].rest == pytest.approx(math.log(1.0 - math.exp(-0.4) - math.exp(-2.0) - math.exp(-3.0)))
    assert len(parse_chat(chat(), k=2).positions[0].top) == 2


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (chat(top_logprobs=None), "no-logprobs"),
        (chat(top_logprobs=[]), "too-few"),
        (chat(logprob=-1.0), "shifted"),
        (chat(logprob=float("nan")), "not-finite"),
        (chat(logprob="-2"), "malformed"),
        (chat(bytes=[300]), "malformed"),
        ({"choices": [{"message": {"content": "b"}}]}, "no-logprobs"),
        ({"choices": []}, "malformed"),
    ],
)
def test_a_chat_answer_without_whole_rows_is_refused(value: Any, kind: str) -> None:
    with pytest.raises(TeacherFailure) as caught:
        parse_chat(value, k=3)
    assert caught.value.kind == kind


def test_headers_that_drip_for_ever_are_a_time_out() -> None:
    done, sent = threading.Event(), 0
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            nonlocal sent
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                # Ends after 20 time-outs: a client that waits for each byte alone would take them all.
                for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 180:
                    if done.wait(0.03):
                        return
                    try:
                        connection.send(bytes([byte]))
                    except OSError:
                        return
                    sent += 1

        thread = threading.Thread(target=drip)
        thread.start()
        client = HttpClient(f"http://127.0.0.1:{server.getsockname()[1]}/v1", timeout=0.3)
        with pytest.raises(TeacherFailure) as caught:
            client.get("/models")
        before = sent
        done.set()
        thread.join()
        client.close()
    assert caught.value.kind == "timeout"
    assert 0 < before < 150


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("filling", [0, 225, 470])
def test_no_part_of_the_key_is_shown_wherever_a_message_is_cut(
    server: tuple[int, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, filling: int, status: int
) -> None:
    text = json.dumps({"error": {"message": "x" * filling + KEY}}) if filling < 400 else "y" * filling + KEY

    def answer(self: Handler) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    monkeypatch.setattr(Handler, "do_POST", answer, raising=False)
    client = HttpClient(f"http://127.0.0.1:{server[0]}/v1", key=KEY, timeout=20)
    with pytest.raises(TeacherFailure) as caught:
        ask(client, "m", Question((1, 2, 3), 1, 10, 10), "prompt_logprobs")
    client.close()
    assert KEY[:8] not in str(caught.value) + str(caught.value.next)


def test_a_key_that_stands_twice_in_one_object_is_no_answer(
    server: tuple[int, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json, "dumps", lambda value, **more: '{"token_id:5": -1.0, "token_id:5": -2.0}')
    client = HttpClient(f"http://127.0.0.1:{server[0]}/v1", timeout=20)
    with pytest.raises(TeacherFailure, match="one key twice"):
        client.get("/twice")
    client.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://u:hidden-pw@127.0.0.1:1"),
        ("ALL_PROXY", "foo://u:hidden-pw@127.0.0.1:1"),
        ("SSL_CERT_FILE", "no-such.pem"),
    ],
)
def test_an_environment_that_no_request_can_be_made_in_is_refused_with_what_to_mend(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RefusedError) as caught:
        HttpClient("https://teacher.invalid/v1")
    assert name in str(caught.value) + str(caught.value.next)
    assert "hidden-pw" not in str(caught.value)
