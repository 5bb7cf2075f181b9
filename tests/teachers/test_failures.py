"""Failures of a teacher over a wire: told apart, with a next command, without a secret."""

from __future__ import annotations

import pytest

from latentforge.teachers.failures import KINDS, RETRIED, TeacherFailure, public_url
from latentforge.verdicts.exitcode import ExitCode


@pytest.mark.parametrize("kind", KINDS)
def test_every_failure_names_its_kind_the_server_and_what_to_type_next(kind: str) -> None:
    failure = TeacherFailure(kind, "said no", url="http://me:secret@gx10:8000/v1?key=secret#secret", status=418)  # type: ignore[arg-type]
    assert str(failure) == f"teacher http://gx10:8000/v1 (HTTP 418): said no [{kind}]"
    assert failure.next
    assert failure.code is not ExitCode.PASS
    assert failure.passing == (kind in RETRIED)


def test_only_what_was_never_sent_is_a_transport_failure() -> None:
    sent = {k for k in KINDS if TeacherFailure(k, "").code is ExitCode.TRANSPORT}  # type: ignore[arg-type]
    assert sent == {"unauthorized", "tls", "connection"}


def test_an_unknown_kind_is_a_mistake_of_the_program() -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        TeacherFailure("other", "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h.example/v1/", "https://h.example/v1/"),
        ("http://[::1]:80/v1?k=p", "http://[::1]:80/v1"),
        ("http://h:port/v1?k=p", "(an URL that cannot be read)"),
        ("u:p@h.example/v1", "(an URL without a host)"),
    ],
)
def test_an_url_is_shown_without_what_may_be_secret(url: str, shown: str) -> None:
    assert public_url(url) == shown
