"""Names of several hosts on a command line: a list, or a lane of the inventory."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from dispatch.hosts.inventory import Host, Inventory
from latentforge.errors import RefusedError


def several(text: str, flag: str, inventory: Inventory, env: Mapping[str, str]) -> tuple[Host, ...]:
    """The hosts that ``a,b`` names, or a lane of ``hosts.toml``, in order; refused where one is unknown or twice."""
    words = [word.strip() for word in text.split(",")]
    if len(words) == 1 and words[0] in inventory.lanes:
        words = list(inventory.lanes[words[0]])
    if not all(words):
        raise RefusedError(f"{flag} {text!r} holds an empty name", next="latentforge dispatch hosts   lists them")
    twice = next((word for number, word in enumerate(words) if word in words[:number]), None)
    if twice is not None:
        raise RefusedError(f"{flag} {text!r} names {twice!r} twice")
    if len(words) == 1 and words[0] not in inventory.names():
        near = difflib.get_close_matches(words[0], inventory.lanes, n=1)
        if near:
            raise RefusedError(f"{flag} {text!r} is neither a host nor a lane", next=f"did you mean {near[0]!r}?")
    return tuple(inventory.choose(word, env) for word in words)
