"""Special tokens of a tokenizer's folder: who plays which role, what is put around a text, how a chat is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers

from latentforge.data.tokenizer import Tokenizer, read_json
from latentforge.errors import RefusedError

Role = Literal["bos", "eos", "pad", "unk"]
ROLES: tuple[Role, ...] = ("bos", "eos", "pad", "unk")
BosRule = Literal["none", "add"]


@dataclass(frozen=True)
class AddedToken:
    """A token beside the model's own vocabulary, with the flags that decide which text becomes it."""

    content: str
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool
    single_word: bool

    def differs_in(self, other: AddedToken) -> list[str]:
        """Names of the fields that are not the same in both."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class SpecialTokens:
    """What a folder says of its special tokens.

    ``roles`` holds the id of each role that is named; ``added`` the added tokens by id; ``before`` and ``after`` are
    the ids that the tokenizer puts around a text by itself (what a server does with a prompt that is text, not ids);
    ``chat_template_sha256`` the digest of its chat template, None where it has none.
    """

    roles: dict[Role, int]
    added: dict[int, AddedToken]
    before: tuple[int, ...]
    after: tuple[int, ...]
    chat_template_sha256: str | None


def special_tokens(folder: Path, tokenizer: Tokenizer | None = None) -> SpecialTokens:
    """Read a folder's tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat template.

    RefusedError where a role names a token that is not in the vocabulary.
    """
    tokenizer = Tokenizer.open(folder) if tokenizer is None else tokenizer
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    config = read_json(folder / "tokenizer_config.json")
    named = [config, read_json(folder / "special_tokens_map.json")]
    roles: dict[Role, int] = {"eos": tokenizer.eos_id}
    for role in ROLES:
        text = next((found for one in named if (found := _text(one.get(f"{role}_token"))) is not None), None)
        if text is None or role == "eos":
            continue
        if text not in vocabulary:
            raise RefusedError(f"{folder}: {role}_token {text!r} is not in its tokenizer.json")
        roles[role] = vocabulary[text]
    before, after = _around(tokenizer.backend)
    # Written where the class builds its template when it is loaded, as the Llama tokenizers do.
    if not before and config.get("add_bos_token") is True and "bos" in roles:
        before = (roles["bos"],)
    if not after and config.get("add_eos_token") is True:
        after = (roles["eos"],)
    added = {
        number: AddedToken(
            token.content, token.special, token.normalized, token.lstrip, token.rstrip, token.single_word
        )
        for number, token in tokenizer.backend.get_added_tokens_decoder().items()
    }
    return SpecialTokens(roles, added, before, after, _chat_template(folder, config))


def bos_of(folder: Path, rule: BosRule, tokenizer: Tokenizer | None = None) -> int | None:
    """The id that begins each document under ``rule``, None for none.

    Refused where the rule would train on other contexts than the model knows: ``none`` for a tokenizer that puts a BOS
    before each text by itself (its server would add one to every prompt in silence), ``add`` for one that has no BOS.
    """
    found = special_tokens(folder, tokenizer)
    bos = found.roles.get("bos")
    if rule == "add":
        if bos is None:
            raise RefusedError(f"data.bos = 'add': {folder} names no bos_token", next="set data.bos = 'none'")
        if found.before not in ((), (bos,)):
            raise RefusedError(
                f"data.bos = 'add': the tokenizer of {folder} begins each text with ids {list(found.before)}, "
                f"not with its bos_token (id {bos}) alone",
                next="correct the post_processor of tokenizer.json, or bos_token in tokenizer_config.json",
            )
        return bos
    if found.before:
        shown = ", ".join(f"{tokenizer_text(folder, one)!r} (id {one})" for one in found.before)
        raise RefusedError(
            f"data.bos = 'none': the tokenizer of {folder} puts {shown} before each text by itself, so its model knows "
            "documents that begin so, and a server would add it in silence",
            next="set data.bos = 'add'",
        )
    return None


def tokenizer_text(folder: Path, number: int) -> str:
    """The text of one token as its tokenizer.json writes it."""
    return str(Tokenizer.open(folder).backend.id_to_token(number))


def _around(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    raise RefusedError("the tokenizer changes a text where it adds special tokens to it", next="use another tokenizer")


def _text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    template = config.get("chat_template")
    if template is None:
        return None
    content = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
