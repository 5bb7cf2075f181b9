"""From a teacher's section to its check: a server's over the wire, any other backend's in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import FailedError, LatentForgeError, RefusedError
from latentforge.spec.fields import HTTP_BACKENDS
from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.alignment import embedding_rows
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.findings import CAPABILITIES, Ability, Finding, Report
from latentforge.teachers.opening import CHAT_ONLY, connect, key_of, open_teacher
from latentforge.teachers.probing import Check, check_local
from latentforge.teachers.store import StoreTeacher


def check_teacher(
    spec: TeacherSpec, folder: Path | None, env: Mapping[str, str], *, k: int, requests: int = 16
) -> Report:
    """Check the teacher of a section; RefusedError for what cannot be asked at all (no URL, no key, no such folder)."""
    if spec.backend in HTTP_BACKENDS:
        return check_served(spec, folder, env, k=k, requests=requests)
    if folder is None and spec.backend != "store":
        raise RefusedError(
            "no teacher is named",
            next="latentforge teacher check --url http://host:8000/v1    or --backend hf --tokenizer FOLDER",
        )
    report = Report(str(folder or spec.store), spec.backend)
    try:
        teacher = open_teacher(spec, folder, "cpu", env)
    except LatentForgeError as error:
        report.findings.append(Finding.of("open", error))
        return report
    try:
        report.teacher = teacher.identity.model
        report.add("open", "pass", f"{teacher.identity.model}, {teacher.vocab_size} tokens")
        if isinstance(teacher, StoreTeacher):
            return check_store(teacher, report, folder, k=k)
        return check_local(teacher, report, k=k)
    finally:
        teacher.close()


def check_store(teacher: StoreTeacher, report: Report, folder: Path | None, *, k: int) -> Report:
    """Read every row of a store: it answers what was scored, and nothing else can be asked of it."""
    store = teacher.store
    temperatures = ", ".join(f"{one:g}" for one in store.temperatures)
    try:
        teacher.limits.check(k=k, tokens=2, temperatures=())
        health = store.check()
        if not health.rows:
            raise FailedError(f"{store.path} holds no rows", next="run the score run")
        if not health.good:
            wrong = health.structure or f"{len(health.damaged)} of {health.rows} rows are damaged"
            raise FailedError(
                f"{store.path}: {wrong}",
                next=f"latentforge targets check {store.path} --drop, then the score run again",
            )
        report.add("score", "pass", f"{health.rows} rows read, none damaged: k = {store.k}, T = {temperatures}")
    except LatentForgeError as error:
        report.findings.append(Finding.of("score", error))
    if folder is not None and Tokenizer.open(folder).sha256 != teacher.identity.tokenizer_sha256:
        what = f"its rows are of another tokenizer.json ({teacher.identity.tokenizer_sha256[:12]}…) than {folder}'s"
        report.findings.append(Finding.of("tokenizer", TeacherFailure("wrong-ids", what)))
    report.abilities += [
        Ability(name, name in teacher.capabilities, report.code == 0 if name == "score" else False)
        for name in CAPABILITIES
    ]
    return report


def check_served(
    spec: TeacherSpec, folder: Path | None, env: Mapping[str, str], *, k: int, requests: int = 16
) -> Report:
    """Check a server (see :class:`latentforge.teachers.probing.Check`)."""
    key_of(spec, env)
    tokenizer = Tokenizer.open(folder) if folder is not None else None
    client = connect(spec, env)
    try:
        return Check(
            client,
            connect=lambda url: connect(spec, env, url),
            backend=spec.backend,
            wanted=spec.served_model,
            k=k,
            tokenizer=tokenizer,
            rows=embedding_rows(folder) if folder is not None else None,
            requests=requests,
            concurrency=spec.concurrency,
            chat_only=spec.backend in CHAT_ONLY,
        ).run()
    finally:
        client.close()
