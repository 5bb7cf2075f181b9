"""The one place where a teacher's section of a spec becomes something that answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from latentforge.errors import RefusedError
from latentforge.spec.sections import TeacherSpec

if TYPE_CHECKING:
    from latentforge.teachers.protocol import Teacher


def open_teacher(spec: TeacherSpec, folder: Path | None, device: str, env: Mapping[str, str]) -> Teacher:
    """Open the backend that ``spec`` names, or that ``auto`` comes to; it is the caller's to close.

    ``folder`` holds the tokenizer and config.json, and the weights where the backend computes in this process;
    ``device`` is torch's name for where it does; ``env`` holds the key under the name that ``spec.api_key_env`` says.
    RefusedError, with nothing sent, where the section or the folder cannot be meant.
    """
    backend = spec.backend if spec.backend != "auto" else _auto(spec)
    if backend == "store":
        from latentforge.teachers.store import StoreTeacher

        assert spec.store is not None  # the section requires it
        return StoreTeacher.open(Path(spec.store))
    if folder is None:
        raise RefusedError(
            f"teacher.backend = {backend!r} needs a folder with its tokenizer", next="name teacher.model"
        )
    if backend == "hf":
        from latentforge.teachers.hf import HFTeacher

        return HFTeacher.open(folder, device=device)
    if backend == "fixture":
        from latentforge.data.tokenizer import Tokenizer
        from latentforge.teachers.fixture import FixtureTeacher

        return FixtureTeacher(Tokenizer.open(folder).vocab_size)
    raise RefusedError(f"teacher.backend = {backend!r} cannot be opened by this version", next="teacher.backend = 'hf'")


def _auto(spec: TeacherSpec) -> str:
    return "store" if spec.store is not None else "openai" if spec.url is not None else "hf"


def key_of(spec: TeacherSpec, env: Mapping[str, str]) -> str | None:
    """The value of the key that the section names; None where it names none. Refused by its name where it is empty."""
    if spec.api_key_env is None:
        return None
    value = env.get(spec.api_key_env, "")
    if not value:
        raise RefusedError(
            f"teacher.api_key_env = {spec.api_key_env!r}, and that variable is not set",
            next=f"read -rs {spec.api_key_env} && export {spec.api_key_env}",
        )
    return value
