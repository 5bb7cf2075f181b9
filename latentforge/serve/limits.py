"""What a server accepts, at most: every bound in one place, each an option of ``latentforge serve``."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from latentforge.errors import RefusedError

STOPS, STOP_CHARACTERS = 4, 256
"""Stop strings of a request, and the length of each."""
TEXTS = 64
"""Texts of one request: its prompts times the choices of each."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a server. Times are seconds; RefusedError where one is not above 0."""

    max_batch: int = 64  # texts that are written together
    queue: int = 256  # texts that wait for a place among them; one more is answered with 429
    max_prompt: int = 4096  # tokens of a prompt
    max_tokens: int = 2048  # new tokens of a text
    max_draws: int = 1000  # draws for a chunk
    max_body: int = 1 << 20  # bytes of a request's body
    deadline: float = 60.0  # for a text, from its request on
    grace: float = 20.0  # to finish what is under way once the server is asked to stop

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                option = "--" + field.name.replace("_", "-")
                raise RefusedError(f"{option} {value:g} is not above 0", next=f"{option} {field.default:g}")

    @property
    def texts(self) -> int:
        """Texts of one request, at most: they find a place in the queue together."""
        return min(TEXTS, self.queue)
