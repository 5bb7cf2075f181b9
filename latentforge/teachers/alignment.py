"""Teacher and student must mean the same token by the same id, and make the same ids of the same text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentforge.data.special import ROLES, Role, SpecialTokens, special_tokens
from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import RefusedError
from latentforge.teachers.probes import PROBE_TEXTS

_OWN_TOKENS = 256
_SAME = "use the teacher's tokenizer for the data and the student"


@dataclass(frozen=True)
class Alignment:
    """Two vocabularies that agree: ``tokens`` real tokens on both sides.

    ``teacher_rows`` and ``student_rows`` are the embedding rows that the folders' config.json declare, None where a
    folder has only a tokenizer; rows beyond ``tokens`` are padding. ``remarks`` are differences that change no id.
    """

    tokens: int
    teacher_rows: int | None
    student_rows: int | None
    remarks: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each side that has padding rows, one for each remark."""
        sides = (("teacher", self.teacher_rows), ("student", self.student_rows))
        padded = tuple(
            f"{side} has {rows} embedding rows for {self.tokens} tokens: {rows - self.tokens} padding rows are masked"
            for side, rows in sides
            if rows is not None and rows > self.tokens
        )
        return (*padded, *self.remarks)


def compare_vocabularies(teacher_tokenizer_dir: Path, student_tokenizer_dir: Path) -> Alignment:
    """Compare two folders token by token, and what they make of a text; refused at the first difference that matters.

    Equal sizes prove nothing: one swapped pair teaches the student to write one token for another. Nor do equal
    vocabularies: another normaliser or pre-tokenizer makes other ids of the same text. Compared are all tokens by id,
    added ones included; the flags of added tokens; the tokens that play BOS, EOS and PAD; what is put around a text;
    the ids of :data:`PROBE_TEXTS`. Embedding rows may outnumber tokens (padding, said in ``notes``), not the reverse.
    """
    folders = Path(teacher_tokenizer_dir), Path(student_tokenizer_dir)
    teacher, student = (Tokenizer.open(folder) for folder in folders)
    words = tuple(_vocabulary(one) for one in (teacher, student))
    first = first_difference(*words)
    if first is not None:
        raise RefusedError(
            f"vocabularies differ first at id {first}: teacher has {_shown(words[0], first)} ({len(words[0])} tokens), "
            f"student has {_shown(words[1], first)} ({len(words[1])} tokens)",
            next=_SAME,
        )
    remarks: list[str] = []
    specials = special_tokens(folders[0], teacher), special_tokens(folders[1], student)
    if teacher.sha256 != student.sha256:
        _check_added(*specials)
        remarks += _check_encoding(teacher, student)
    remarks += _check_roles(*specials, words[0])
    tokens = max(words[0]) + 1
    rows = {}
    for side, folder in zip(("teacher", "student"), folders, strict=True):
        rows[side] = embedding_rows(folder)
        if (found := rows[side]) is not None and found < tokens:
            raise RefusedError(
                f"{side} {folder} has {found} embedding rows for {tokens} tokens: ids {found} and up have no embedding",
                next="resize the embedding to the tokenizer, or use the tokenizer that the model was trained with",
            )
    return Alignment(tokens, rows["teacher"], rows["student"], tuple(remarks))


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


def _check_added(teacher: SpecialTokens, student: SpecialTokens) -> None:
    """Refuse an added token whose flags differ: the same text then becomes it on one side alone."""
    for number in sorted({*teacher.added, *student.added}):
        one, other = teacher.added.get(number), student.added.get(number)
        if one is None or other is None:
            has, lacks = ("teacher", "student") if other is None else ("student", "teacher")
            content = (one or other).content  # type: ignore[union-attr]
            raise RefusedError(
                f"token {number} ({content!r}) is an added token of the {has} alone; "
                f"to the {lacks} it is a piece of text",
                next=_SAME,
            )
        if fields := one.differs_in(other):
            said = ", ".join(f"{name} = {getattr(one, name)} / {getattr(other, name)}" for name in fields)
            raise RefusedError(
                f"added token {number} ({one.content!r}) has other flags (teacher / student): {said}", next=_SAME
            )


def _check_roles(teacher: SpecialTokens, student: SpecialTokens, words: dict[int, str]) -> Iterator[str]:
    """Refuse another EOS, another BOS, other ids put around a text; say what changes no packed row."""
    titles: dict[Role, str] = {"bos": "begins", "eos": "ends"}
    for role, does in titles.items():
        one, other = teacher.roles.get(role), student.roles.get(role)
        if one is not None and other is not None and one != other:
            raise RefusedError(
                f"the teacher {does} a document with {words[one]!r} (id {one}), the student with {words[other]!r} "
                f"(id {other}): {role}_token differs",
                next=f"set {role}_token of the student's tokenizer_config.json to {words[one]!r}",
            )
    if (teacher.before, teacher.after) != (student.before, student.after):
        raise RefusedError(
            f"around a text the teacher's tokenizer puts ids {list(teacher.before)} … {list(teacher.after)}, the "
            f"student's {list(student.before)} … {list(student.after)} (post_processor, add_bos_token, add_eos_token)",
            next=_SAME,
        )
    for role in ROLES:
        one, other = teacher.roles.get(role), student.roles.get(role)
        if one != other:
            shown = [f"{words[n]!r} (id {n})" if n is not None else "none" for n in (one, other)]
            yield f"{role}_token: teacher {shown[0]}, student {shown[1]}; packed rows hold none that was not asked for"
    templates = teacher.chat_template_sha256, student.chat_template_sha256
    if templates[0] != templates[1]:
        shown = [f"sha256 {digest[:12]}…" if digest else "none" for digest in templates]
        yield f"chat template: teacher {shown[0]}, student {shown[1]}; documents are scored as plain text without it"


def _check_encoding(teacher: Tokenizer, student: Tokenizer) -> Iterator[str]:
    """Refuse where a probe text gets other ids; say where parts are written otherwise though no probe shows it."""
    for text in (*PROBE_TEXTS, *_own_texts(teacher)):
        one, other = (side.backend.encode(text, add_special_tokens=False).ids for side in (teacher, student))
        if one == other:
            continue
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        parts = _differing_parts(teacher, student)
        raise RefusedError(
            f"the same text gives other ids: {text[:40]!r} becomes {len(one)} tokens for the teacher, {len(other)} for "
            f"the student, differing first at token {at} ({_at(one, at)} / {_at(other, at)})"
            + (f"; tokenizer.json differs in {', '.join(parts)}" if parts else ""),
            next=_SAME,
        )
    for part in _differing_parts(teacher, student):
        yield f"tokenizer.json: {part} is written otherwise, though every probe text gets the same ids"


def _own_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts made of the vocabulary itself: every token in turn, between blanks too; other merges show here."""
    for token in tokenizer.backend.get_added_tokens_decoder().values():
        yield f"x{token.content} {token.content}y"
    for start in range(0, tokenizer.vocab_size, _OWN_TOKENS):
        ids = range(start, min(start + _OWN_TOKENS, tokenizer.vocab_size))
        words = [word for i in ids if (word := tokenizer.backend.decode([i], skip_special_tokens=True))]
        yield "".join(words)
        yield " ".join(words)


def _differing_parts(teacher: Tokenizer, student: Tokenizer) -> list[str]:
    one, other = (json.loads(side.backend.to_str()) for side in (teacher, student))
    found = [part for part in ("normalizer", "pre_tokenizer") if one.get(part) != other.get(part)]
    models = one["model"], other["model"]
    return found + [
        f"model.{name}" for name in sorted({*models[0], *models[1]}) if models[0].get(name) != models[1].get(name)
    ]


def _vocabulary(tokenizer: Tokenizer) -> dict[int, str]:
    words: dict[int, str] = {}
    for text, number in sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items()):
        if number in words:
            raise RefusedError(
                f"{tokenizer.folder}: tokens {words[number]!r} and {text!r} have one id, {number}",
                next="use the tokenizer.json that the model was trained with",
            )
        words[number] = text
    return words


def _shown(vocabulary: dict[int, str], number: int) -> str:
    return repr(vocabulary[number]) if number in vocabulary else "none"


def _at(ids: list[int], at: int) -> str:
    return f"id {ids[at]}" if at < len(ids) else "nothing"
