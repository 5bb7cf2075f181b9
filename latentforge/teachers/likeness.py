"""A teacher must not be its own student: compared by content, since a copy may have any name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from latentforge.errors import RefusedError
from latentforge.teachers.folder import check_model_folder


def same_weights(teacher: Path, student: Path) -> bool:
    """Whether two model folders hold the same tensors, whatever their names, sharding or metadata."""
    return check_model_folder(teacher).weights_sha256 == check_model_folder(student).weights_sha256


def check_unlike(teacher: Path, student: Path, *, profile: Literal["smoke", "full"]) -> str | None:
    """Refuse, in profile ``full``, a student that starts as its teacher; in ``smoke`` return the sentence to say.

    None where they differ. Distilling a model into itself trains nothing and looks like success.
    """
    digest = check_model_folder(teacher).weights_sha256
    if digest != check_model_folder(student).weights_sha256:
        return None
    message = f"teacher and student are the same model (weights sha256 {digest[:12]}…)"
    if profile == "full":
        raise RefusedError(
            f"{message}: teacher {teacher}, student {student}",
            next="name another distill.student.init, or leave it out to start a new, smaller student",
        )
    return f"{message}: accepted for profile smoke only"
