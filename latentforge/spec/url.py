"""The address of a server, as a spec may name it: without a secret in it."""

from __future__ import annotations

from urllib.parse import urlsplit


def check_url(url: str) -> None:
    """Refuse (ValueError) a server's address that is not http(s), or that holds what must not be written down."""
    if any(character.isspace() or not character.isprintable() for character in url):
        raise ValueError("url holds a blank or a control character")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"url does not parse: {error}") from None
    if "@" in parts.netloc:  # The value is not repeated: what stands before the @ is a secret.
        raise ValueError("url holds a user or password before the @: api_key_env names the variable of a key")
    if parts.query or parts.fragment:
        raise ValueError("url holds a ? or #, and so perhaps a key: api_key_env names the variable of a key")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        # Without http:// no user and no password is found in it, and may stand there all the same.
        shown = "url" if "@" in url else f"url = {url!r}"
        raise ValueError(f"{shown} is not http://host:port/… or https://host:port/…")
