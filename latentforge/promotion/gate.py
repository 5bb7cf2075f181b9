"""What must hold before a student is published: each condition is looked at again, none is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.evidence.digests import tree_files
from latentforge.evidence.reading import RunRecord, read_run
from latentforge.evidence.verify import Verification, verify_evidence
from latentforge.students.latent.generate import generate
from latentforge.students.latent.requests import Request
from latentforge.train.falsifiers import judge
from latentforge.verdicts import Outcome, Verdict
from latentforge.writers.opening import Writer, open_writer

PRODUCT = "out/student"
REQUIRED = {
    "distill": ("F-DISTILL-SMOKE-001",),
    "latent": ("F-LATENT-CAUSAL-001", "F-LATENT-KD-001"),
}
"""What a student of each kind must have shown besides what every run is judged by, asked for by its spec or not."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_READ = 64
"""Tokens of a recorded text that are read again."""


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
        *_claims(record),
        *_weights(record.folder / PRODUCT),
    ]
    return Gate(record, verification, tuple(conditions))


def _evidence(found: Verification) -> Condition:
    told = f"{found.standing}, {found.subjects} files" if found.outcome is Outcome.PASS else found.problems[0]
    text = told if isinstance(told, str) else f"{told.what} {told.text}"
    return Condition("evidence", found.outcome, text)


def _ended(record: RunRecord) -> Condition:
    said = f"the run ended with {record.end['outcome']}" + (f": {record.reason}" if record.reason else "")
    return Condition("end", record.outcome, said)


def _profile(record: RunRecord, smoke: bool) -> Condition:
    profile = record.identity.spec.get("profile") if record.identity else None
    if profile == "full":
        return Condition("profile", Outcome.PASS, "full")
    if profile != "smoke":
        return Condition("profile", Outcome.UNKNOWN, f"profile {profile!r} is neither full nor smoke")
    text = "smoke: a run that shows that the line works, on what is at hand"
    return Condition(
        "profile", Outcome.PASS if smoke else Outcome.FAIL, text + ("" if smoke else " (--smoke takes it)")
    )


def _claims(record: RunRecord) -> Iterator[Condition]:
    """Every falsifier that is due, judged again from the run's events, and held against what the run recorded."""
    asked: Any = (record.identity.spec.get(record.kind) or {}).get("require", ()) if record.identity else ()
    due = tuple(dict.fromkeys((*asked, *REQUIRED[record.kind])))
    recorded = {verdict.falsifier: verdict for verdict in record.verdicts}
    judged = {verdict.falsifier: verdict for verdict in judge(record.events, due)}
    for name, verdict in judged.items():
        yield _claim(name, verdict, recorded.pop(name, None))
    for name, verdict in recorded.items():  # what the run was judged by, and nobody can judge again from its events
        yield Condition(name, verdict.outcome, verdict.text)


def _claim(name: str, again: Verdict, said: Verdict | None) -> Condition:
    if said is not None and said.outcome is not again.outcome:
        text = f"recorded as {said.outcome.name.lower()}, but from the events: {again.text}"
        return Condition(name, min(said.outcome, again.outcome), text)
    return Condition(name, again.outcome, again.text)


def _weights(product: Path) -> Iterator[Condition]:
    """The weights are whole, numbers, and a model that knows more of held-out text than one that guesses."""
    try:
        yield _numbers(product)
        writer = open_writer(product)
    except LatentForgeError as error:
        yield Condition("weights", Outcome.FAIL, str(error))
        return
    yield _knows(writer, product.parent / "samples.json")


def _numbers(product: Path) -> Condition:
    files = [(name, path) for name, path in tree_files(product)] if product.is_dir() else []
    pickles = [name for name, _ in files if name.endswith(_PICKLES)]
    if pickles:
        raise RefusedError(f"{PRODUCT}/{pickles[0]} is a pickle: published weights are safetensors alone")
    weights = [path for name, path in files if name.endswith(".safetensors")]
    if not weights:
        raise RefusedError(f"{PRODUCT} holds no safetensors")
    tensors = count = 0
    for path in weights:
        for name, value in _tensors(path):
            tensors, count = tensors + 1, count + value.numel()
            if not value.isfinite().all():
                return Condition("weights", Outcome.FAIL, f"{name} holds numbers that are not finite")
            if value.ndim > 1 and value.numel() > 1 and (value == value.flatten()[0]).all():
                return Condition("weights", Outcome.FAIL, f"every element of {name} is {value.flatten()[0].item():g}")
    return Condition("weights", Outcome.PASS, f"{count:,} finite numbers in {tensors} tensors")


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - a safe_open is no mapping
                yield name, stored.get_tensor(name)
    except Exception as error:  # the library raises its own type, and OSError for what is too short to map
        size = path.stat().st_size
        raise RefusedError(f"{path.name} of {size} bytes cannot be read as safetensors: {error}") from None


def _knows(writer: Writer, samples: Path) -> Condition:
    """Held-out texts that the run recorded, read again by the weights as they lie on disk."""
    rows = _texts(writer, samples)
    if not rows:
        return Condition("knows", Outcome.UNKNOWN, "the run recorded no held-out text in out/samples.json")
    if not writer.model.completes:
        return _writes(writer, rows)
    guess = math.log(writer.tokenizer.vocab_size)
    scores = writer.model.score([torch.tensor(prompt + text) for prompt, text in rows])
    said = torch.cat([score[-len(text) :] for (_, text), score in zip(rows, scores, strict=True)]).double()
    loss = -said.mean().item()
    told = f"{loss:.3f} nats a token over {len(said)} recorded held-out tokens, {guess:.3f} is a guess"
    return Condition("knows", Outcome.PASS if loss < guess else Outcome.FAIL, told)


def _writes(writer: Writer, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Condition:
    """A student without a token head says no probability of a text; that it writes is all that can be seen again."""
    asked = [Request(prompt[: len(prompt) // writer.model.chunk * writer.model.chunk], _READ) for prompt, _ in rows]
    written = [one for one in generate(writer.model, asked) if one.tokens]
    text = f"no token head to read with: it wrote after {len(written)} of {len(asked)} recorded prompts"
    return Condition("knows", Outcome.PASS if len(written) == len(asked) else Outcome.FAIL, text)


def _texts(writer: Writer, samples: Path) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and following text, as ids, of each record that has both."""
    try:
        found = json.loads(samples.read_bytes())
        pairs = [(writer.encode(one["prompt"]), writer.encode(one["text"])) for one in found]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise RefusedError(f"{samples.name} is no list of prompts and texts: {error!r}") from None
    return [(prompt, text[len(writer.before) :][:_READ]) for prompt, text in pairs if len(text) > len(writer.before)]
