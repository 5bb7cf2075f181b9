"""The end of a dispatch: the copy, the manifest and its ledger entry, the verification, the exit code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dispatch.collect import Collected, collect, locked
from dispatch.following.lines import single_line
from dispatch.following.record import WatchRecord, ending_of
from dispatch.following.view import verdict_of
from dispatch.following.watcher import judge_copy
from dispatch.hosts.facts import RunState
from dispatch.places import Places
from dispatch.transport.call import Transport
from latentforge.errors import FailedError
from latentforge.events import sift_events
from latentforge.evidence.ledger import LEDGER, read_chain
from latentforge.evidence.manifest import record
from latentforge.evidence.statement import MANIFEST, build_statement
from latentforge.evidence.verify import Verification, verify_evidence
from latentforge.verdicts import ExitCode, Outcome, Verdict, exit_code, meet


@dataclass(frozen=True)
class Conclusion:
    """What there is to say of an ended run: verdicts, evidence, and the exit code that follows from both."""

    run: str
    verdicts: list[Verdict]
    collected: Collected | None
    manifest: str | None
    problems: list[str]
    code: ExitCode
    standing: str = "verified, unsigned"
    """How the evidence stands: by whom it was signed, if anyone did."""
    reason: str = ""
    """Why a run that did not pass ended, in its own words."""

    def lines(self) -> list[str]:
        """The last lines of a dispatch."""
        lines = [verdict.line() for verdict in self.verdicts]
        lines += [f"FAILED  {problem}" for problem in self.problems]
        if self.manifest is not None:
            lines.append(f"evidence: {self.manifest}  " + (self.standing if not self.problems else "NOT verified"))
        return lines


def conclude(
    transport: Transport,
    run: str,
    state: RunState,
    places: Places,
    *,
    plan: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Conclusion:
    """Collect an ended run, write its evidence unless that was done, verify it, and say which exit code it earned."""
    earned = earned_code(state)
    followed = places.followed(transport.host.name, run)
    if state.state != "finished":
        if state.has_ended:
            WatchRecord(run, *ending_of(state), reason=state.reason or "").save(followed)
        # Lost or interrupted: the host itself cannot say what the run left, so there is nothing to vouch for.
        return Conclusion(run, [], None, None, [], earned)
    folder = places.run(run)
    copied, verification, watched = None, _verified_here(places, run), None
    if verification is None:
        try:
            copied = collect(transport, run, places)
        except FailedError as error:
            # What it left cannot be vouched for; how it ended is known all the same.
            return Conclusion(run, [], None, None, [str(error)], worst([earned, ExitCode.FAIL]))
        with locked(places, run):
            if not _is_recorded(places, run):
                watched = judge_copy(folder, run, state)
                carrier = "local" if transport.host.is_local else "ssh"
                dispatched = {"carrier": carrier, "agent": transport.agent, "watched": watched.as_json()}
                record(folder, build_statement(folder, plan=dict(plan), host=dict(facts), dispatched=dispatched))
            verification = verify_evidence(folder)
    watched = watched or judge_copy(folder, run, state)
    watched.save(followed)
    problems = [f"{problem.what}  {problem.text}" for problem in verification.problems]
    events, broken = sift_events(folder / "events.jsonl") if (folder / "events.jsonl").is_file() else ([], [])
    # An event that names another run is no word of this one's.
    verdicts = [said for event in events if event.run == run and (said := verdict_of(event)) is not None]
    codes = [earned, watched.code]
    if verification.outcome is not Outcome.PASS:
        codes.append(exit_code(verification.outcome))
    if broken:
        problems.append(f"events.jsonl  line {broken[0]} is no event, nor are {len(broken) - 1} others")
        codes.append(ExitCode.UNKNOWN)
    if earned is ExitCode.PASS and (verdicts or run.startswith(("distill-", "autoencoder-", "latent-"))):
        # A trainer that ends with 0 beside a failed falsifier of its own, or without a word of any, is not believed.
        codes.append(exit_code(meet(verdict.outcome for verdict in verdicts)))
    verdicts += watched.verdicts
    ends = [event.fields.get("reason") for event in events if event.kind == "end"]
    reason = single_line(ends[-1] or "") if ends else ""
    return Conclusion(
        run, verdicts, copied, str(folder / MANIFEST), problems, worst(codes), verification.standing, reason
    )


def _verified_here(places: Places, run: str) -> Verification | None:
    """The verification of a copy that is whole and recorded, for which its host need not be asked; else None."""
    if not (places.run(run) / MANIFEST).is_file():
        return None
    with locked(places, run):
        verification = verify_evidence(places.run(run)) if _is_recorded(places, run) else None
    return verification if verification is not None and verification.outcome is Outcome.PASS else None


def earned_code(state: RunState) -> ExitCode:
    """The exit code that an ended run earned; whatever is not known to have passed is unknown, never green."""
    if state.state in ("absent", "reserved"):
        return ExitCode.CRASHED  # cancelled while it waited for its turn
    if state.exit is None:
        return ExitCode.UNKNOWN
    try:
        return ExitCode(state.exit)
    except ValueError:
        return ExitCode.UNKNOWN


def worst(codes: list[ExitCode]) -> ExitCode:
    """The code that outranks the others: stalled, crashed and transport before fail, fail before unknown, pass last."""
    order = (
        *(ExitCode.TRANSPORT, ExitCode.CRASHED, ExitCode.STALLED, ExitCode.FAIL, ExitCode.REFUSED, ExitCode.UNKNOWN),
        *(ExitCode.BUSY, ExitCode.DETACHED),
    )
    return next((code for code in order if code in codes), ExitCode.PASS)


def _is_recorded(places: Places, run: str) -> bool:
    """Whether the run's evidence stands in the ledger; a ledger that is broken is reported, never added to."""
    if not places.ledger.exists():
        return False
    entry = read_chain(places.ledger).of_run(run)
    if entry is not None and not (places.run(run) / MANIFEST).is_file():
        raise FailedError(
            f"{places.run(run) / MANIFEST} is gone, but {LEDGER} has its entry {entry.entry}: evidence is written once",
            next="restore it, or keep new copies apart with EVIDENCE_DIR",
        )
    return entry is not None
