"""From a teacher's section to its check: a server's over the wire, any other backend's in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import LatentForgeError, RefusedError
from latentforge.spec.sections import HTTP_BACKENDS, TeacherSpec
from latentforge.teachers.alignment import embedding_rows
from latentforge.teachers.findings import Finding, Report
from latentforge.teachers.opening import CHAT_ONLY, connect, key_of, open_teacher
from latentforge.teachers.probing import Check, check_local


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
        return check_local(teacher, report, k=k)
    finally:
        teacher.close()


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
