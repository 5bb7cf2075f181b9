"""How good students are, by one protocol: the same held-out rows, contexts, prompts and seeds for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentforge.data.pieces import TokenBytes
from latentforge.data.shards import ShardSet
from latentforge.errors import RefusedError
from latentforge.students.latent.agreement import Agreement, agreement
from latentforge.students.latent.bootstrap import Interval, ratio
from latentforge.students.latent.brier import ORDERS, BrierLM, brier_lm, sample_scores, token_scores
from latentforge.students.latent.chunks import chunked, valid
from latentforge.students.latent.evaluate import continuations
from latentforge.students.latent.requests import Request, Sampling, check_request, simplest
from latentforge.students.latent.session import LatentModel
from latentforge.students.likelihood import chunk_logprobs, row_logprobs
from latentforge.students.token_evaluate import token_continuations
from latentforge.students.token_session import TokenModel
from latentforge.writers.opening import Writer
from latentforge.writers.quality_cost import Cost, cost_of
from latentforge.writers.rollout import Place, Texts, Written, as_json, places, write, write_in_window

Tell = Callable[[str], None]
_BLOCK = 4  # rows between two words on how far it is
_APART = 1 << 40  # between the seeds of one measurement and the next
_LARGEST = 1 << 62  # seed


@dataclass(frozen=True)
class Protocol:
    """What is measured: ``rows`` held-out rows with ``draws`` continuations after each chunk; ``texts`` of ``chunks``
    chunks after prompts of ``prompt`` chunks, written by ``sampling``. Two values of different protocols, or of
    different data, do not compare."""

    rows: int = 32
    draws: int = 16
    texts: int = 8
    chunks: int = 64
    prompt: int = 8
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name, low in {"rows": 1, "draws": 2, "texts": 1, "chunks": 1, "prompt": 1}.items():
            if getattr(self, name) < low:
                raise RefusedError(f"{name} = {getattr(self, name)} is less than {low}")
        if not -_LARGEST <= self.seed < _LARGEST:
            raise RefusedError(
                f"seed = {self.seed} is not from -2^62 to below 2^62: the draws' own are counted from it"
            )


class HeldOut(NamedTuple):
    """Rows as chunks int64 [B, C, K], the ``numbers`` of these rows in the shard, and the ``widths`` in bytes of each
    token of them, int64 [B, C, K]: an EOS has none, padding neither."""

    chunks: Tensor
    numbers: tuple[int, ...]
    widths: Tensor
    eos_id: int


@dataclass(frozen=True)
class Quality:
    """What one model is worth. ``bits_per_byte`` is None where it gives no probabilities of tokens, ``agreement`` and
    ``rollout`` where there was no teacher."""

    name: str
    writer: Writer
    cost: Cost
    brier_lm: BrierLM
    bits_per_byte: Interval | None
    agreement: Agreement | None
    rollout: tuple[Place, ...]

    def as_json(self) -> dict[str, Any]:
        """The figures as data."""
        return {
            "name": self.name,
            "kind": self.writer.kind,
            "digests": self.writer.digests,
            "parameters": self.writer.parameters,
            **self.cost.as_json(),
            "brier_lm": self.brier_lm._asdict(),
            "bits_per_byte": None if self.bits_per_byte is None else self.bits_per_byte._asdict(),
            "agreement": None if self.agreement is None else self.agreement._asdict(),
            "rollout": as_json(self.rollout),
        }


@dataclass(frozen=True)
class Report:
    """The models by one protocol: students first, then the teacher where one was given. ``real`` are the teacher's bits
    a token of how the text itself goes on after the prompts, none without one."""

    protocol: Protocol
    chunk: int
    positions: int
    data: Path
    contexts: int
    models: tuple[Quality, ...]
    real: tuple[Place, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as data."""
        shown = {name: getattr(self, name) for name in ("chunk", "positions", "contexts")}
        return {
            "schema": 1,
            "protocol": {**asdict(self.protocol), **shown, "data": str(self.data)},
            "models": [one.as_json() for one in self.models],
            "real_text": as_json(self.real),
        }


def held_out(data: ShardSet, asked: Protocol) -> HeldOut:
    """``asked.rows`` held-out rows from all over the shard: neighbours are often one document."""
    if asked.rows > len(data.heldout):
        raise RefusedError(
            f"rows = {asked.rows}: {data.folder} holds {len(data.heldout)} rows out", next=f"--rows {len(data.heldout)}"
        )
    numbers = tuple(number * len(data.heldout) // asked.rows for number in range(asked.rows))
    tokens = torch.from_numpy(data.heldout.rows(numbers))
    pieces = TokenBytes.of(data.tokenizer()).pieces
    width = torch.tensor([0 if piece is None else len(piece) for piece in pieces])
    chunks = chunked(tokens, data.chunk)
    return HeldOut(chunks, numbers, width[chunks] * valid(chunks, data.eos_id), data.eos_id)


def teacher_folder(path: Path) -> Path:
    """The model's folder of ``path``: a teacher run, its ``out``, or the model itself."""
    for folder in (path / "out" / "model", path / "model"):
        if (folder / "config.json").is_file():
            return folder
    return path


def measure(
    students: Sequence[tuple[str, Writer]], teacher: Writer | None, data: ShardSet, asked: Protocol, *, tell: Tell
) -> Report:
    """Measure ``students`` by their names, and the ``teacher`` itself, on the held-out rows of ``data``.

    RefusedError where a model's tokenizer, or a latent student's chunk, is not the data's.
    """
    _check(students, teacher, data)
    text = held_out(data, asked)
    prompts, real = _prompts(data, asked)
    for _, writer in students:
        for number, prompt in enumerate(prompts):
            sampling = simplest(writer.model, asked.sampling)
            check_request(
                writer.model, number, Request(prompt, asked.chunks * data.chunk, asked.seed + number, sampling)
            )
    drawn = None
    models = list(students)
    if teacher is not None:
        drawn = _drawn(teacher, text, asked, asked.seed + _APART, None, lambda told: tell(f"teacher: draws, {told}"))
        models.append(("teacher", teacher))
    found = [_measured(name, one, teacher, drawn, text, prompts, data, asked, tell) for name, one in models]
    shown: tuple[Place, ...] = ()
    if teacher is not None:
        shown = places(*_reader(teacher), Written(prompts, real, 1.0), chunk=data.chunk)
    return Report(asked, data.chunk, data.sequence_length, data.folder, found[0].brier_lm.contexts, tuple(found), shown)


def _measured(
    name: str,
    writer: Writer,
    teacher: Writer | None,
    reference: _Drawn | None,
    text: HeldOut,
    prompts: Texts,
    data: ShardSet,
    asked: Protocol,
    tell: Tell,
) -> Quality:
    beside = None if reference is None else reference.samples
    drawn = _drawn(writer, text, asked, asked.seed, beside, lambda told: tell(f"{name}: BrierLM, {told}"))
    agreed = None if beside is None else agreement(drawn.samples, beside, groups=drawn.rows)
    tell(f"{name}: bits a byte")
    bits = _bits_per_byte(writer, text)
    tell(f"{name}: {len(prompts)} texts of {asked.chunks} chunks")
    written = _written(writer, prompts, data, asked, is_teacher=writer is teacher)
    rollout: tuple[Place, ...] = ()
    if teacher is not None:
        rollout = places(*_reader(teacher), written, chunk=data.chunk)
    cost = cost_of(writer, positions=data.sequence_length, draws=written.draws)
    return Quality(name, writer, cost, brier_lm(drawn.scores, groups=drawn.rows), bits, agreed, rollout)


class _Drawn(NamedTuple):
    """Draws int64 [M, N, 4] after M contexts, their scores fp64 [M, 4], and the row of each context."""

    samples: Tensor
    scores: Tensor
    rows: Tensor


def _drawn(writer: Writer, text: HeldOut, asked: Protocol, seed: int, beside: Tensor | None, tell: Tell) -> _Drawn:
    """The draws of a model after each chunk; in blocks of rows, with the keys that all at once would have."""
    count, length, size = text.chunks.shape
    contexts = length - -(-ORDERS // size)
    parts = []
    for start in range(0, count, _BLOCK):
        tell(f"{start} of {count} rows")
        chunks = text.chunks[start : start + _BLOCK]
        key = seed + start * length * asked.draws
        if isinstance(writer.model, LatentModel):
            some = None if beside is None else beside[start * contexts : (start + len(chunks)) * contexts]
            one = continuations(writer.model, chunks, draws=asked.draws, seed=key, beside=some)
            parts.append(_Drawn(one.samples, sample_scores(one.samples, one.truth), one.rows + start))
        else:
            model = _token_level(writer)
            other = token_continuations(
                model.student,
                chunks,
                eos_id=text.eos_id,
                draws=asked.draws,
                seed=key,
                kernel_backend=model.kernel_backend,
            )
            scores = token_scores(other.truth_logprobs, other.samples, other.collisions)
            parts.append(_Drawn(other.samples, scores, other.rows + start))
    return _Drawn(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _bits_per_byte(writer: Writer, text: HeldOut) -> Interval | None:
    """Over all tokens but those of a row's first chunk, which a latent student is not asked for: the bits of an EOS
    count and it has no byte, padding counts neither."""
    model = writer.model
    if not model.completes:
        return None
    parts = []
    for chunks in text.chunks.split(_BLOCK):
        if isinstance(model, LatentModel):
            parts.append(chunk_logprobs(model.student, chunks.to(model.device), text.eos_id).cpu())
        else:
            teller = _token_level(writer)
            row = row_logprobs(teller.student, chunks.flatten(1).to(teller.device)).cpu()
            parts.append(row[:, chunks.shape[2] - 1 :].reshape(chunks[:, 1:].shape))
    counted = valid(text.chunks, text.eos_id)[:, 1:]
    bits = -(torch.cat(parts).double() * counted).sum((1, 2)) / math.log(2)
    return ratio(bits, text.widths[:, 1:].sum((1, 2)).double())


def _written(writer: Writer, prompts: Texts, data: ShardSet, asked: Protocol, *, is_teacher: bool) -> Written:
    new_tokens = asked.chunks * data.chunk
    if is_teacher:  # to be compared with: as it was trained, at temperature 1
        model, window = _reader(writer)
        return write_in_window(model, prompts, new_tokens=new_tokens, seed=asked.seed, window=window)
    sampling = simplest(writer.model, asked.sampling)
    return write(writer.model, prompts, new_tokens=new_tokens, seed=asked.seed, sampling=sampling)


def _prompts(data: ShardSet, asked: Protocol) -> tuple[Texts, Texts]:
    """Beginnings of ``asked.prompt`` chunks from all over the held-out rows, and how the text goes on, to its end or
    for ``asked.chunks`` chunks. A beginning holds no end of a text: what follows would be another one."""
    begin, more = asked.prompt * data.chunk, asked.chunks * data.chunk
    rows = -(-(begin + more) // data.sequence_length)
    starts = max(0, len(data.heldout) - rows + 1)
    spread = [number * starts // asked.texts for number in range(min(asked.texts, starts))]
    prompts: list[tuple[int, ...]] = []
    real: list[tuple[int, ...]] = []
    for row in dict.fromkeys([*spread, *range(starts)]):
        stream = data.heldout.rows(list(range(row, row + rows))).flatten().tolist()
        prompt, text = stream[:begin], stream[begin : begin + more]
        if data.eos_id in prompt:
            continue
        if data.eos_id in text:
            text = text[: text.index(data.eos_id) + 1]
        prompts.append(tuple(prompt))
        real.append(tuple(text))
        if len(prompts) == asked.texts:
            return tuple(prompts), tuple(real)
    raise RefusedError(
        f"texts = {asked.texts} of {asked.prompt} + {asked.chunks} chunks: {data.folder} holds {len(prompts)} out",
        next="ask for fewer or shorter texts, or hold more rows out (data.heldout_sequences)",
    )


def _check(students: Sequence[tuple[str, Writer]], teacher: Writer | None, data: ShardSet) -> None:
    for name, writer in [*students, *([] if teacher is None else [("teacher", teacher)])]:
        if writer.tokenizer.sha256 != data.tokenizer_sha256:
            raise RefusedError(
                f"{name} {writer.folder} has tokenizer {writer.tokenizer.sha256[:12]}…, the data has "
                f"{data.tokenizer_sha256[:12]}…: their figures do not compare",
                next="name the data run that it was trained on",
            )
        if isinstance(writer.model, LatentModel) and writer.model.chunk != data.chunk:
            raise RefusedError(
                f"{name} {writer.folder} writes chunks of {writer.model.chunk}, the data is cut into chunks of "
                f"{data.chunk}",
                next="name the data run that it was trained on",
            )
    if teacher is not None:
        _token_level(teacher)


def _token_level(writer: Writer) -> TokenModel:
    if not isinstance(writer.model, TokenModel):
        raise RefusedError(f"{writer.folder} is no token-level model", next="name a Hugging Face folder as the teacher")
    return writer.model


def _reader(teacher: Writer) -> tuple[TokenModel, int]:
    """The teacher, and how many positions it knows."""
    model = _token_level(teacher)
    known = getattr(model.student.model.config, "max_position_embeddings", None)
    return model, known if isinstance(known, int) else 1 << 30
