"""What `teacher check` says where no server answers as one: nobody there, no certificate, a web page, no key."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from latentforge.cli import main
from latentforge.errors import RefusedError
from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.checking import check_served, check_teacher
from latentforge.teachers.findings import Report
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.http.probe import probe
from latentforge.teachers.http.rows import Form
from latentforge.teachers.probing import OneTry

from ..http.wire import VOCABULARY, answer, logits_of, question


class _Pages(BaseHTTPRequestHandler):
    """A web server: a page for every path but those of ``answers``."""

    protocol_version = "HTTP/1.1"
    answers: dict[str, tuple[int, str]]

    def do_GET(self) -> None:
        status, text = self.answers.get(self.path, self.answers["*"])
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@contextmanager
def pages(answers: dict[str, tuple[int, str]], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    handler = type("Pages", (_Pages,), {"answers": answers})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def checked(url: str, timeout: float = 10.0) -> Report:
    spec = TeacherSpec(backend="openai", url=url, timeout=timeout)
    return check_served(spec, None, {}, k=20)


MODELS = json.dumps({"object": "list", "data": [{"id": "m"}]})
PAGE = "<!doctype html><html><title>It works</title></html>"


def self_signed(folder: Path) -> None:
    """``key.pem`` and ``cert.pem`` of 127.0.0.1, signed by nobody else."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
    signed = made.sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))


def test_a_refused_connection_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        assert main(["teacher", "check", "--url", url]) == 6
    said = capsys.readouterr().out
    assert "[connection]" in said
    assert "next: " in said


def test_a_name_that_nobody_knows_is_a_failed_connection() -> None:
    report = checked("http://no-such-host.invalid/v1")
    assert (report.kind, int(report.code)) == ("connection", 6)


def test_a_certificate_of_its_own_is_not_accepted_and_told_as_that(tmp_path: Path) -> None:
    self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with pages({"*": (200, MODELS)}, context) as url:
        report = checked(f"{url}/v1")
        (failed,) = report.findings
        assert (failed.kind, int(report.code)) == ("tls", 6), failed.said
        assert "certificate" in failed.said
        assert "certificate" in str(failed.next)
        # Control: the same server over an authority that is trusted has no such failure.
        with pytest.MonkeyPatch.context() as trusted:
            trusted.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
            assert checked(f"{url}/v1").findings[0].state == "pass"


def test_plain_http_where_tls_was_asked_for_is_a_failure_of_tls() -> None:
    with pages({"*": (200, MODELS)}) as url:
        report = checked(url.replace("http://", "https://") + "/v1")
    assert (report.kind, int(report.code)) == ("tls", 6)


@pytest.mark.parametrize(("status", "kind", "code"), [(200, "malformed", 1), (404, "model-not-found", 2)])
def test_a_web_page_is_no_api_and_is_said_to_be_one(status: int, kind: str, code: int) -> None:
    with pages({"*": (status, PAGE)}) as url:
        report = checked(f"{url}/openai/v1")
    (failed,) = report.findings
    assert (failed.kind, int(report.code)) == (kind, code)
    assert "a web page answers there" in str(failed.next)


def test_an_api_one_level_deeper_is_found() -> None:
    with pages({"/v1/models": (200, MODELS), "*": (200, PAGE)}) as url:
        report = checked(url)
    assert report.findings[0].next == f"the API is one level deeper:  --url {url}/v1"


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [(401, "unauthorized", 6), (403, "unauthorized", 6), (429, "rate-limited", 1), (502, "server-error", 1)],
)
def test_a_list_of_models_that_is_refused_is_told_by_its_status(status: int, kind: str, code: int) -> None:
    with pages({"*": (status, '{"error": {"message": "no"}}')}) as url:
        report = checked(f"{url}/v1")
    assert (report.kind, int(report.code)) == (kind, code)
    assert str(status) in report.findings[0].said


def test_several_models_and_none_named_are_listed() -> None:
    two = json.dumps({"data": [{"id": "a"}, {"id": "b"}]})
    with pages({"*": (200, two)}) as url:
        report = checked(f"{url}/v1")
    failed = report.findings[-1]
    assert (failed.kind, int(report.code), failed.next) == ("model-not-found", 2, "--model a")


def test_a_key_that_is_not_set_is_refused_by_its_name_before_anything_is_sent() -> None:
    spec = TeacherSpec(backend="venice", url="http://127.0.0.1:1/v1", api_key_env="VENICE_API_KEY")
    with pytest.raises(RefusedError, match="VENICE_API_KEY"):
        check_served(spec, None, {"VENICE_API_KEY": ""}, k=20)


def test_nothing_named_is_refused_with_how_to_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teacher", "check"]) == 2
    assert "--url" in capsys.readouterr().err
    assert main(["teacher", "check", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["exit_code"], told["steps"]) == (False, 2, [])
    assert "--url" in told["next"]
    assert main(["teacher", "check", "--backend", "venis"]) == 2
    assert "'vllm-local-inproc'" in capsys.readouterr().err


def test_a_failure_that_nobody_expected_is_json_too_with_the_exit_code_that_it_earns(
    tmp_path: Path,
    make_model: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_model(tmp_path / "m")

    def broken(*arguments: object, **more: object) -> None:
        raise KeyError("nobody expected this")

    monkeypatch.setattr("latentforge.teachers.precision.open_hf", broken)
    assert main(["teacher", "check", "--backend", "hf", "--tokenizer", str(tmp_path / "m"), "--json"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["exit_code"], told["steps"]) == (False, 5, [])
    assert "unexpected KeyError" in told["error"]


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 9}, {"hidden_size": "32"}, {"quantization_config": ["fp8"]}, {"text_config": 5}]
)
def test_a_config_that_cannot_be_meant_is_a_refused_folder_and_no_crash(
    config: dict[str, object], tmp_path: Path, make_model: Callable[..., object]
) -> None:
    make_model(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    report = check_teacher(TeacherSpec(backend="hf"), tmp_path / "m", {}, k=8)
    assert [(one.step, int(one.code)) for one in report.findings] == [("open", 2)]


def test_more_entries_than_there_are_tokens_are_not_answered_with_fewer(
    tmp_path: Path, make_model: Callable[..., object]
) -> None:
    make_model(tmp_path / "m")
    report = check_teacher(TeacherSpec(backend="hf"), tmp_path / "m", {}, k=271)
    assert int(report.code) == 2
    assert "larger than the vocabulary (270 tokens)" in report.findings[-1].said


@pytest.mark.parametrize("status", [200, 500])
def test_what_no_terminal_can_show_is_not_printed(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    name = r"\u001b[31mred\ud800"
    said = f'{{"data": [{{"id": "{name}"}}], "error": {{"message": "{name}"}}}}'
    with pages({"*": (status, said)}) as url:
        assert main(["teacher", "check", "--url", f"{url}/v1"]) == 1
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    shown.encode()


def test_a_teacher_in_this_process_is_asked_the_same(
    tmp_path: Path, make_model: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "m")
    report = check_teacher(TeacherSpec(backend="fixture"), tmp_path / "m", {}, k=8)
    assert int(report.code) == 0, report.lines()
    assert main(["teacher", "check", "--backend", "hf", "--tokenizer", str(tmp_path / "m"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["capabilities"]["score"]["probed"], found["capabilities"]["logits"]["declared"]) == (True, True)
    assert found["figures"]["tokens_per_s"] > 0


@pytest.mark.parametrize("damaged", [1, 0])
def test_an_answer_that_is_damaged_once_is_told_though_another_form_of_question_is_answered(
    damaged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = logits_of(8)
    left = [damaged]

    def post(self: HttpClient, path: str, body: dict[str, object]) -> object:
        form: Form = "prompt_logprobs" if "prompt_logprobs" in body else "echo"
        k = int(str(body.get("prompt_logprobs", body.get("logprobs"))))
        if left[0] and form == "prompt_logprobs":
            left[0] -= 1
            self.failure("malformed", "half of an answer", status=200)
        if k > VOCABULARY:
            self.failure("refused-request", f"max allowed: {VOCABULARY}", status=400)
        ids = body["prompt"]
        assert isinstance(ids, list)
        # The probe's document is eight tokens; asked without its last, that one's row is generated.
        short = len(ids) == 7
        tokens = (*ids, 0) if short else tuple(ids)
        asked = question(tokens, k, last_generated=short)
        return answer(asked, logits[: len(tokens) - 1], form)

    monkeypatch.setattr(HttpClient, "post", post)
    monkeypatch.setattr(HttpClient, "get", lambda self, path: {"data": [{"id": "m"}]})
    client = HttpClient("http://127.0.0.1:9/v1")
    flow = OneTry()
    facts = probe(client, flow, "m", vocab_size=VOCABULARY, rows=VOCABULARY)
    client.close()
    assert (facts.form, facts.damaged is not None) == (("echo", True) if damaged else ("prompt_logprobs", False))
    assert ["half of an answer" in note for note in flow.notes] == [True] * damaged
