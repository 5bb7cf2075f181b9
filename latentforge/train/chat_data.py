"""The data run whose documents are a chat API's answers: prompts in, packed rows and their targets out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from latentforge.data.build import finished, record_of
from latentforge.data.corpus import Corpus, Entry, read_all
from latentforge.data.shards import Packed, ShardSet, pack
from latentforge.data.special import bos_of
from latentforge.data.tokenizer import Tokenizer, copy_tokenizer
from latentforge.errors import FailedError, RefusedError
from latentforge.events import EventLog
from latentforge.spec.run import RunDir
from latentforge.spec.sections import DataSpec
from latentforge.targets.store import TargetStore
from latentforge.teachers.answers import AnswerStore, Asking, Chatter, ask_all
from latentforge.teachers.documents import ChatDocument, ChatReader, ChatTally, packed_targets
from latentforge.teachers.failures import TeacherFailure

ANSWERS = "answers.sqlite"
_BLOCK = 8
"""This many times the concurrency are asked before documents are counted, and it is known whether more are needed."""


@dataclass(frozen=True)
class _Maker:
    teacher: Chatter
    store: AnswerStore
    asking: Asking
    reader: ChatReader
    tally: ChatTally
    progress: Callable[[int], None]
    chunk: int

    def documents(self, entries: Iterator[Entry], tokens: int | None) -> list[ChatDocument]:
        """Documents of the entries' answers, in the entries' order, until they fill ``tokens`` (None: of all)."""
        made: list[ChatDocument] = []
        have = 0
        block = _BLOCK * self.teacher.flow.concurrency
        while prompts := [document.text for document in read_all(islice(entries, block))]:
            answers = dict(ask_all(self.teacher, prompts, self.store, self.asking))
            for number in range(len(prompts)):
                answer = answers[number]
                if isinstance(answer, TeacherFailure):
                    self.tally.refuse(str(answer))
                    continue
                found = self.reader.read(answer)
                self.tally.add(found)
                if isinstance(found, ChatDocument):
                    made.append(found)
                    have += -(-len(found.ids) // self.chunk) * self.chunk
            self.tally.check()
            self.progress(have)
            if tokens is not None and have >= tokens:
                break
        return made


def run_chat(
    run: RunDir, log: EventLog, spec: DataSpec, corpus: Path | str, folder: Path, teacher: Chatter
) -> ShardSet:
    """Ask, read, pack both splits, and write the targets of every packed row beside them."""
    identity = run.load_identity().spec
    asking = Asking(spec.answer_tokens, int(identity["score"]["k"]), int(identity["seed"]))
    run.out.mkdir(parents=True, exist_ok=True)
    _take_over(run, log)
    with log.phase("corpus"):
        prompts = Corpus.open(corpus, scratch=run.out)
    with log.phase("tokenizer"):
        tokenizer = copy_tokenizer(folder, run.out / "tokenizer")
        reader = ChatReader(tokenizer, k=asking.k, bos_id=bos_of(tokenizer.folder, spec.bos, tokenizer))
    length, tally = spec.sequence_length, ChatTally()
    wanted = [spec.heldout_sequences * length, None if spec.train_sequences is None else spec.train_sequences * length]
    with AnswerStore(run.out / ANSWERS) as store, log.phase("ask", prompts=prompts.documents, kept=len(store)):
        if len(store):
            log.say(f"resumes: {len(store)} answers are kept")
        goal = sum(one or 0 for one in wanted)
        progress = lambda n: log.progress("ask", n, max(goal, n))  # noqa: E731
        maker = _Maker(teacher, store, asking, reader, tally, progress, spec.chunk)
        heldout_documents = maker.documents(prompts.entries(heldout=True), wanted[0])
        train_documents = maker.documents(prompts.entries(heldout=False), wanted[1])
    for sentence in tally.sentences():
        log.say(sentence)
    packed_heldout = _pack(run, "heldout", heldout_documents, tokenizer, spec, spec.heldout_sequences)
    packed_train = _pack(run, "train", train_documents, tokenizer, spec, spec.train_sequences)
    record = record_of(prompts, tokenizer, length, packed_train, packed_heldout) | {
        "bos": spec.bos,
        "bos_id": reader.bos_id,
        "chunk": spec.chunk,
        "documents_from": "chat",
        "answer_tokens": spec.answer_tokens,
        "teacher": teacher.identity.as_json(),
        "k": asking.k,
        "answers": tally.record(),
    }
    shards = finished(run.out, record)
    with log.phase("targets"):
        _write_targets(run.out / "targets.sqlite", teacher, asking.k, shards, heldout_documents, train_documents)
    _report(log, teacher, tally)
    return shards


def _pack(
    run: RunDir, name: str, documents: list[ChatDocument], tokenizer: Tokenizer, spec: DataSpec, limit: int | None
) -> Packed:
    encoded = ((one.bytes, one.ids.astype(np.uint32)) for one in documents)
    path, length = run.out / f"{name}.bin", spec.sequence_length
    packed = pack(encoded, path, vocab_size=tokenizer.vocab_size, sequence_length=length, limit=limit, chunk=spec.chunk)
    if packed.rows < (limit or 1):
        raise RefusedError(
            f"data.{name}_sequences = {limit or 1}: the answers fill only {packed.rows} rows of {length} tokens "
            f"({packed.tokens} tokens in {packed.documents} documents)",
            next=f"give more prompts, raise data.answer_tokens, or lower data.{name}_sequences",
        )
    return packed


def _write_targets(
    path: Path, teacher: Chatter, k: int, shards: ShardSet, heldout: list[ChatDocument], train: list[ChatDocument]
) -> None:
    """The targets of every packed row; FailedError where a row of the shard is not the one that they are of."""
    path.unlink(missing_ok=True)
    identity = teacher.identity.as_json()
    with TargetStore.create(path, identity, k, (1.0,), vocab_size=shards.vocab_size) as store:
        for shard, documents in ((shards.heldout, heldout), (shards.train, train)):
            made = packed_targets(documents, length=shards.sequence_length, chunk=shards.chunk)
            for number, (tokens, targets) in zip(range(len(shard)), made, strict=False):
                if not (shard.rows([number])[0] == tokens).all():
                    raise FailedError(f"{shard.path.name} row {number} is not the row that its targets are of")
                store.put_many([(tokens, targets)])


def _take_over(run: RunDir, log: EventLog) -> None:
    """Copy the answers of an earlier attempt: they are paid for."""
    earlier = run.predecessor()
    while earlier is not None and earlier.path.is_dir() and not (earlier.out / ANSWERS).is_file():
        earlier = earlier.predecessor()
    if earlier is None or not earlier.path.is_dir() or (run.out / ANSWERS).exists():
        return
    for name in (f"{ANSWERS}-wal", ANSWERS):
        if (earlier.out / name).is_file():
            shutil.copyfile(earlier.out / name, run.out / name)
    log.say(f"takes over the answers of {earlier.run}")


def _report(log: EventLog, teacher: Chatter, tally: ChatTally) -> None:
    counted = {f"teacher_{name}": value for name, value in teacher.flow.metrics().items()}
    share = tally.kept / tally.total if tally.total else 0.0
    log.emit("metric", name="answers_kept", value=share, step=0, split="all", **tally.record(), **counted)
