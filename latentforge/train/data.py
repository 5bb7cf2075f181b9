"""Recipe of the run kind ``data``: corpus to tokenizer and packed shards."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

from latentforge.data.build import build_shards
from latentforge.data.shards import ShardSet
from latentforge.data.telling import Telling
from latentforge.errors import RefusedError
from latentforge.events import EventLog
from latentforge.evidence.digests import tree_sha256
from latentforge.spec.run import RunDir
from latentforge.spec.sections import DataSpec
from latentforge.spec.teacher import teacher_of


def run(run: RunDir, log: EventLog) -> None:
    """Read the corpus, learn or take the tokenizer, pack both splits, verify what was written."""
    spec = DataSpec.model_validate_json(json.dumps(run.load_identity().spec["data"]))
    corpus = checked_path(run, "corpus") or spec.corpus
    tokenizer = checked_path(run, "tokenizer") if run.has_input("tokenizer") else None
    if spec.documents == "chat":
        shards = _answered(run, log, spec, corpus, tokenizer)
    else:
        shards = build_shards(
            corpus,
            run.out,
            vocab_size=spec.vocab_size,
            sequence_length=spec.sequence_length,
            train_sequences=spec.train_sequences,
            heldout_sequences=spec.heldout_sequences,
            tokenizer_folder=tokenizer,
            bos=spec.bos,
            chunk=spec.chunk,
            telling=Telling(log.phase, log.say, log.progress),
        )
    with log.phase("verify"):
        shards.verify()
    record = shards.record
    log.say(
        f"{len(shards.train)} training and {len(shards.heldout)} held-out rows of {shards.sequence_length} tokens, "
        f"vocabulary {shards.vocab_size}, {record['bytes_per_token']:.2f} bytes a token"
    )


def _answered(run: RunDir, log: EventLog, spec: DataSpec, corpus: Path | str, tokenizer: Path | None) -> ShardSet:
    """The rows of a chat API's answers to the corpus's prompts."""
    from latentforge.teachers.capability import require
    from latentforge.teachers.http.openai import OpenAITeacher
    from latentforge.teachers.opening import open_teacher
    from latentforge.train.chat_data import run_chat

    asked = teacher_of(run)
    teacher = open_teacher(asked, tokenizer, "cpu", os.environ, say=log.say)
    with closing(teacher):
        require(teacher, "chat", "data.documents = 'chat'", instead="teacher.backend = 'venice' or 'openai'")
        if tokenizer is None or not isinstance(teacher, OpenAITeacher):
            raise RefusedError("data.documents = 'chat' needs the tokenizer of the API", next="name teacher.model")
        for note in teacher.notes:
            log.say(note)
        return run_chat(run, log, spec, corpus, tokenizer, teacher)


def checked_path(run: RunDir, name: str) -> Path | None:
    """The path of an external input whose content is still what the run's identity names; None for a built-in."""
    ref = run.input_ref(name)
    if "builtin" in ref:
        return None
    path = run.input_path(name)
    found = tree_sha256(path)
    if found != ref["sha256"]:
        raise RefusedError(
            f"input {name!r} ({path}) changed since it was planned: sha256 {ref['sha256'][:12]}… then, "
            f"{found[:12]}… now",
            next="plan again:  latentforge dispatch go",
        )
    return path
