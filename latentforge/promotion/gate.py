"""What must hold before a student is published: each condition is looked at again, none is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.evidence.configuration import compare_configuration, same
from latentforge.evidence.digests import tree_files
from latentforge.evidence.reading import RunRecord, read_run
from latentforge.evidence.verify import Verification, verify_evidence
from latentforge.students.latent.generate import generate
from latentforge.students.latent.requests import Request
from latentforge.students.token_session import TokenModel
from latentforge.train.falsifiers import judge
from latentforge.train.reading import ready_of
from latentforge.train.samples import NEW_TOKENS
from latentforge.verdicts import Outcome, Verdict
from latentforge.writers.opening import Writer, open_writer

PRODUCT = "out/student"
REQUIRED = {
    "distill": ("F-DISTILL-SMOKE-001",),
    "latent": ("F-LATENT-CAUSAL-001", "F-LATENT-KD-001"),
}
"""What a student of each kind must have shown besides what every run is judged by, asked for by its spec or not."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PUBLISHED = (".safetensors", ".json", ".txt", ".model", ".jinja")
_MOST, _LONGEST = 64, 4096
"""Of recorded texts, and of the tokens before one: more than any run records, few enough to be written again."""


@dataclass(frozen=True)
class Condition:
    """One thing that must hold. ``outcome`` UNKNOWN where it could not be found out, which does not promote either."""

    name: str
    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Gate:
    """A run before its promotion: the record, what verification found, and each condition."""

    record: RunRecord
    verification: Verification
    conditions: tuple[Condition, ...]

    @property
    def unmet(self) -> tuple[Condition, ...]:
        """What does not hold, or is not known to."""
        return tuple(one for one in self.conditions if one.outcome is not Outcome.PASS)

    @property
    def product(self) -> Path:
        """The folder that would be published."""
        return self.record.folder / PRODUCT


def look(run: Path, *, signers: Path | None = None, smoke: bool = False) -> Gate:
    """Look at every condition of a run of kind ``distill`` or ``latent``; RefusedError for another kind.

    ``signers`` is a file of allowed signers, one of whom must have signed. ``smoke`` takes runs of profile smoke.
    """
    record = read_run(run)
    if record.kind not in REQUIRED:
        raise RefusedError(
            f"{record.id} is a {record.kind} run: students are promoted, of {' and '.join(REQUIRED)} runs",
            next="latentforge runs list --kind distill",
        )
    verification = verify_evidence(run, signers=signers)
    conditions = [
        _evidence(verification),
        _ended(record),
        _profile(record, smoke),
        _configuration(record),
        *_claims(record),
        *_weights(record),
    ]
    return Gate(record, verification, tuple(conditions))


def _evidence(found: Verification) -> Condition:
    if found.outcome is Outcome.PASS:
        return Condition("evidence", Outcome.PASS, f"{found.standing}, {found.subjects} files")
    worst = min(found.problems, key=lambda one: one.outcome)
    return Condition("evidence", found.outcome, f"{worst.what} {worst.text}")


def _ended(record: RunRecord) -> Condition:
    if record.outcome is Outcome.PASS and (record.end["record"] or {}).get("code") is None:
        return Condition("end", Outcome.UNKNOWN, "its host recorded no end of its process")
    ends = [event for event in record.events if event.kind == "end"]
    if record.outcome is Outcome.PASS and (len(ends) != 1 or record.events[-1] is not ends[0]):
        told = f"its events tell {len(ends)} ends" if len(ends) > 1 else "its events go on after their end"
        return Condition("end", Outcome.UNKNOWN, f"{told}: a run ends once, and says nothing more")
    said = f"the run ended with {record.end['outcome']}" + (f": {record.reason}" if record.reason else "")
    return Condition("end", record.outcome, said)


def _profile(record: RunRecord, smoke: bool) -> Condition:
    if record.identity is not None and record.identity.is_canary:
        return Condition("profile", Outcome.FAIL, "a canary: the first steps of a full run, and no student of its own")
    profile = record.identity.spec.get("profile") if record.identity else None
    if profile == "full":
        return Condition("profile", Outcome.PASS, "full")
    if profile != "smoke":
        return Condition("profile", Outcome.UNKNOWN, f"profile {profile!r} is neither full nor smoke")
    text = "smoke: a run that shows that the line works, on what is at hand"
    return Condition(
        "profile", Outcome.PASS if smoke else Outcome.FAIL, text + ("" if smoke else " (--smoke takes it)")
    )


def _configuration(record: RunRecord) -> Condition:
    """What was in force, in the trainer's own record and in its events, beside what the identity asks for."""
    if record.effective is None:
        return Condition("configuration", Outcome.UNKNOWN, "the run did not record what was in force")
    # The falsifiers take from the ready event what was asked: only the identity says whether it was.
    spec = record.identity.spec if record.identity else {}
    told_ready = compare_configuration(record.kind, spec, ready_of(record.events))["differences"]
    for where, differences in (("", record.differences), (" (events.jsonl)", told_ready)):
        if differences:
            first = differences[0]
            told = f"{first['field']} = {first['requested']!r} was asked, {first['effective']!r} was in force{where}"
            return Condition("configuration", Outcome.FAIL, told)
    return Condition("configuration", Outcome.PASS, f"{len(record.effective)} values in force are those asked for")


def _claims(record: RunRecord) -> Iterator[Condition]:
    """Every falsifier that is due, judged again from the run's events, and held against what the run recorded."""
    if record.unread:
        yield Condition("events", Outcome.UNKNOWN, f"{record.unread[0]}: what it said is not known")
    elif gap := next(((n, event.seq) for n, event in enumerate(record.events) if event.seq != n), None):
        told = f"event {gap[0]} is numbered {gap[1]}: some were taken out, added or moved"
        yield Condition("events", Outcome.UNKNOWN, told)
    asked: Any = (record.identity.spec.get(record.kind) or {}).get("require", ()) if record.identity else ()
    due = tuple(dict.fromkeys((*asked, *REQUIRED[record.kind])))
    recorded = {verdict.falsifier: verdict for verdict in record.verdicts}
    try:
        judged = {verdict.falsifier: verdict for verdict in judge(record.events, due)}
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        yield Condition("events", Outcome.UNKNOWN, f"they cannot be judged again: {type(error).__name__}: {error}")
        return
    for name, verdict in judged.items():
        yield _claim(name, verdict, recorded.pop(name, None))
    for name, verdict in recorded.items():  # what nobody can judge again from the events: the run's own word
        yield Condition(name, verdict.outcome, verdict.text)


def _claim(name: str, again: Verdict, said: Verdict | None) -> Condition:
    if said is not None and said.outcome is not again.outcome:
        text = f"recorded as {said.outcome.name.lower()}, but from the events: {again.text}"
        return Condition(name, min(said.outcome, again.outcome), text)
    found = json.loads(json.dumps(again.measured))
    for what, value in (said.measured if said is not None else {}).items():
        if what in found and not _as_measured(value, found[what]):
            text = f"recorded with {what} = {value!r}, but from the events it is {found[what]!r}"
            return Condition(name, Outcome.FAIL, text)
    return Condition(name, again.outcome, again.text)


def _as_measured(said: Any, found: Any) -> bool:
    """Whether a recorded value is the one that follows; a number that JSON has no form for was recorded as text."""
    if type(said) is float and type(found) is float:
        return math.isclose(said, found, rel_tol=1e-9, abs_tol=1e-9)  # another machine's cosine has other last bits
    return same(said, found) or bool(said == str(found))


def _weights(record: RunRecord) -> Iterator[Condition]:
    """The weights are whole, numbers, and write what the trained model wrote."""
    product = record.folder / PRODUCT
    try:
        yield _numbers(product)
        writer = _opened(product)
    except LatentForgeError as error:
        yield Condition("weights", Outcome.FAIL, str(error))
        return
    try:
        yield _writes_again(writer, record)
    except LatentForgeError as error:
        yield Condition("writes", Outcome.FAIL, str(error))


def _opened(product: Path) -> Writer:
    try:
        return open_writer(product)
    except LatentForgeError:
        raise
    except Exception as error:  # transformers checks a configuration in many places, each with a type of its own
        told = " ".join(str(error).split())
        raise RefusedError(f"{PRODUCT} cannot be opened: {type(error).__name__}: {told}") from None


def _numbers(product: Path) -> Condition:
    files = [(name, path) for name, path in tree_files(product)] if product.is_dir() else []
    pickles = [name for name, _ in files if name.endswith(_PICKLES)]
    if pickles:
        raise RefusedError(f"{PRODUCT}/{pickles[0]} is a pickle: published weights are safetensors alone")
    foreign = [name for name, _ in files if not name.endswith(_PUBLISHED)]
    if foreign:
        raise RefusedError(f"{PRODUCT}/{foreign[0]} is no weights, configuration or tokenizer: it is not published")
    weights = [(name, path) for name, path in files if name.endswith(".safetensors")]
    if not weights:
        raise RefusedError(f"{PRODUCT} holds no safetensors")
    seen: dict[tuple[str, str], str] = {}
    count = 0
    for file, path in weights:
        for name, value in _tensors(path):
            first = seen.setdefault((file.rpartition("/")[0], name), file)
            if first != file:
                return Condition("weights", Outcome.FAIL, f"{name} stands in {first} and in {file}")
            count += value.numel()
            if not value.isfinite().all():
                return Condition("weights", Outcome.FAIL, f"{name} holds numbers that are not finite")
            if value.ndim > 1 and value.numel() > 1 and (value == value.flatten()[0]).all():
                return Condition("weights", Outcome.FAIL, f"every element of {name} is {value.flatten()[0].item():g}")
    return Condition("weights", Outcome.PASS, f"{count:,} finite numbers in {len(seen)} tensors")


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - a safe_open is no mapping
                yield name, stored.get_tensor(name)
    except Exception as error:  # the library raises its own type, and OSError for what is too short to map
        size = path.stat().st_size
        raise RefusedError(f"{path.name} of {size} bytes cannot be read as safetensors: {error}") from None


def _writes_again(writer: Writer, record: RunRecord) -> Condition:
    """What the trained model wrote, as the run recorded it, beside what the weights on disk write after its prompts."""
    samples = record.folder / "out" / "samples.json"
    name = "student" if record.kind == "distill" else "latent"
    try:
        told = [(one["prompt"], one[name]) for one in json.loads(samples.read_bytes())]
        pairs = [(writer.encode(prompt), text) for prompt, text in told]
    except FileNotFoundError:
        pairs = []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RefusedError(f"{samples.name} is no list of prompts and of what the {name} wrote: {error!r}") from None
    if not pairs:
        return Condition("writes", Outcome.UNKNOWN, "the run recorded no text of its student in out/samples.json")
    if len(pairs) > _MOST or not all(0 < len(prompt) <= _LONGEST and isinstance(text, str) for prompt, text in pairs):
        raise RefusedError(
            f"{samples.name} holds what no run records: texts, at most {_MOST}, after 1 to {_LONGEST} tokens"
        )
    same = sum(_goes_on(writer, prompt, text) for prompt, text in pairs)
    text = f"{same} of {len(pairs)} recorded texts of the trained student are what the weights on disk write"
    return Condition("writes", Outcome.PASS if 2 * same >= len(pairs) else Outcome.FAIL, text)


def _goes_on(writer: Writer, prompt: tuple[int, ...], text: str) -> bool:
    """Whether what the model writes after a prompt, in the way in which the run recorded it, begins with the text."""
    if isinstance(writer.model, TokenModel):
        found = writer.model.student.continue_greedily(torch.tensor([prompt]), NEW_TOKENS)[0, len(prompt) :].tolist()
    else:
        found = list(generate(writer.model, [Request(prompt, NEW_TOKENS)])[0].tokens)
    return bool(text) and str(writer.tokenizer.backend.decode(found, skip_special_tokens=False)).startswith(text)
