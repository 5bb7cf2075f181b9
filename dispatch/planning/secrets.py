"""Secrets that runs are given: named in the pipeline, taken from this command's environment when a run is reserved.

Their names are part of what a run means; their values travel on stdin, lie on the host in a file that only its owner
can read until the run has started, and are in no plan, command, log, journal or manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from latentforge.errors import RefusedError
from latentforge.evidence.secrets import DENIED_NAME

SHORTEST = 8
"""A shorter value could not be told from innocent text where evidence is searched for it."""
_LONGEST = 64 * 1024


def check_names(names: Iterable[str]) -> None:
    """Refuse a name by which evidence would not know a secret for one."""
    for name in names:
        if not DENIED_NAME.search(name):
            raise RefusedError(
                f"secrets: {name!r} does not say that it is a secret, so evidence could not be kept clean of it",
                next="rename the variable:  …_TOKEN, …_API_KEY, …_SECRET, …_PASSWORD",
            )


def values(names: Iterable[str], env: Mapping[str, str]) -> dict[str, str]:
    """The secrets by name; refused by name where one is not set, or cannot be a secret."""
    found = {}
    for name in names:
        if not (value := env.get(name)):
            raise RefusedError(
                f"the pipeline names the secret {name!r}, which is not set in this command's environment",
                next=f"read -rs {name} && export {name}",
            )
        if not SHORTEST <= len(value) <= _LONGEST or "\0" in value:
            raise RefusedError(
                f"the secret {name!r} has {len(value)} characters; it takes {SHORTEST} to {_LONGEST}, none of them NUL"
            )
        found[name] = value
    return found
