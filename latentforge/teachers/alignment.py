"""Teacher and student must mean the same token by the same id: compared one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from latentforge.data.tokenizer import vocabulary
from latentforge.errors import RefusedError


@dataclass(frozen=True)
class Alignment:
    """Two vocabularies that agree: ``tokens`` real tokens on both sides.

    ``teacher_rows`` and ``student_rows`` are the embedding rows that the folders' config.json declare, None where a
    folder has only a tokenizer; rows beyond ``tokens`` are padding.
    """

    tokens: int
    teacher_rows: int | None
    student_rows: int | None

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each side that has padding rows."""
        sides = (("teacher", self.teacher_rows), ("student", self.student_rows))
        return tuple(
            f"{side} has {rows} embedding rows for {self.tokens} tokens: {rows - self.tokens} padding rows are masked"
            for side, rows in sides
            if rows is not None and rows > self.tokens
        )


def compare_vocabularies(teacher_tokenizer_dir: Path, student_tokenizer_dir: Path) -> Alignment:
    """Compare the tokens of two folders id by id, added tokens included; refused at the first id that differs.

    Equal sizes prove nothing: one swapped pair teaches the student to write one token for another. Embedding rows may
    outnumber tokens (padding, said in ``notes``) but not the reverse.
    """
    teacher, student = vocabulary(Path(teacher_tokenizer_dir)), vocabulary(Path(student_tokenizer_dir))
    first = first_difference(teacher, student)
    if first is not None:
        raise RefusedError(
            f"vocabularies differ first at id {first}: teacher has {_shown(teacher, first)} ({len(teacher)} tokens), "
            f"student has {_shown(student, first)} ({len(student)} tokens)",
            next="use the teacher's tokenizer for the data and the student",
        )
    tokens = max(teacher) + 1
    rows = {}
    for side, folder in (("teacher", teacher_tokenizer_dir), ("student", student_tokenizer_dir)):
        rows[side] = embedding_rows(Path(folder))
        if (found := rows[side]) is not None and found < tokens:
            raise RefusedError(
                f"{side} {folder} has {found} embedding rows for {tokens} tokens: ids {found} and up have no embedding",
                next="resize the embedding to the tokenizer, or use the tokenizer that the model was trained with",
            )
    return Alignment(tokens, rows["teacher"], rows["student"])


def first_difference(teacher: dict[int, str], student: dict[int, str]) -> int | None:
    """The first id whose token differs or that one side lacks; None where the vocabularies are the same."""
    differing = (number for number in {*teacher, *student} if teacher.get(number) != student.get(number))
    return min(differing, default=None)


def embedding_rows(folder: Path) -> int | None:
    """The embedding rows that a folder's config.json declares; None where it has no config.json."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_bytes())
        rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (ValueError, AttributeError) as error:
        raise RefusedError(f"{file} cannot be read: {error}") from None
    return rows if type(rows) is int else None


def _shown(vocabulary: dict[int, str], number: int) -> str:
    return repr(vocabulary[number]) if number in vocabulary else "none"
