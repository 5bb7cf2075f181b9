"""How the runs of a pipeline ended, for the end of a dispatch: each with what its falsifiers said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dispatch.following.view import RunView, verdict_of
from dispatch.hosts.facts import RunState
from dispatch.places import Places
from dispatch.planning.choice import ChosenRun
from latentforge.events import sift_events
from latentforge.verdicts import Verdict

NOT_RUN = "not run"


@dataclass(frozen=True)
class RunEnd:
    """One run of a pipeline: how it ended, and its verdicts; None where nobody on this laptop has followed it."""

    kind: str
    run: str
    ended: str
    verdicts: tuple[Verdict, ...] | None

    def lines(self) -> list[str]:
        """The run's line, and below it one for each verdict."""
        unknown = "" if self.verdicts is not None else f"   verdicts: latentforge dispatch watch {self.run}"
        return [
            f"  {self.kind:<13} {self.ended:<8} {self.run}{unknown}",
            *(f"    {one.line()}" for one in self.verdicts or ()),
        ]

    def as_json(self) -> dict[str, Any]:
        """The same for programs; ``verdicts`` is null where they are not known here."""
        told = None if self.verdicts is None else [verdict_json(one) for one in self.verdicts]
        return {"kind": self.kind, "run": self.run, "ended": self.ended, "verdicts": told}


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict for programs."""
    return {"line": verdict.line(), "outcome": verdict.outcome.name.lower(), "measured": verdict.measured}


def ends_of(
    runs: Sequence[ChosenRun], followed: Mapping[str, RunState], views: Mapping[str, RunView], places: Places, host: str
) -> list[RunEnd]:
    """The ends of a plan's ``runs`` that are needed, in their order.

    ``followed`` are the states of those that this command saw end, with their ``views``. What was kept said its
    verdicts earlier: they are read from the copy, or from what was followed then.
    """
    found = []
    for one in runs:
        if one.will == "skip":
            continue
        state = followed.get(one.run, one.state if one.will in ("keep", "ended") else None)
        if state is None:
            found.append(RunEnd(one.kind, one.run, NOT_RUN, ()))
            continue
        view = views.get(one.run)
        verdicts = view.verdicts if view is not None else _noted(places, host, one.run)
        # An event that names another run is no word of this one's.
        mine = None if verdicts is None else tuple(said for said in verdicts if said.run == one.run)
        found.append(RunEnd(one.kind, one.run, state.outcome or state.state, mine))
    return found


def _noted(places: Places, host: str, run: str) -> list[Verdict] | None:
    for folder in (places.run(run), places.followed(host, run)):
        file = folder / "events.jsonl"
        if file.is_file():
            return [said for event in sift_events(file)[0] if (said := verdict_of(event)) is not None]
    return None
