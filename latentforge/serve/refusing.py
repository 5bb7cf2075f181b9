"""Answers that say no: a status, what was wrong with which field, and nothing of what is inside."""

from __future__ import annotations

from typing import Any

_SHOWN = 80  # characters of a value


class Refusal(Exception):
    """A request that is answered with ``status``; ``field`` is the one to mend, None where it is none."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        code: str = "invalid_value",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        """The answer in OpenAI's form."""
        return error_body(self.status, str(self), self.field, self.code)


def error_body(status: int, message: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``; what cannot be written as UTF-8 is escaped."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": plain(message), "type": kind, "param": field and plain(field), "code": code}}


def plain(text: str) -> str:
    """``text`` as something that UTF-8 has: a surrogate of broken JSON is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and not all of a long one."""
    if isinstance(value, (list, tuple, dict)) and len(value) > _SHOWN:
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, str) and len(value) > _SHOWN:
        value = value[:_SHOWN] + "…"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "…"
