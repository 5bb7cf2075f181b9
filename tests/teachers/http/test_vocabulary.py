"""A server whose tokens are not those of the local folder is noticed before a document is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentforge.data import ShardSet
from latentforge.data.tokenizer import Tokenizer
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http import openai
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.http.openai import OpenAITeacher
from latentforge.teachers.http.probe import ServerFacts

Change = Callable[[dict[str, Any]], None]
MANY = 270  # of the tests' vocabulary


def swapped(one: int, other: int) -> Change:
    def change(tokenizer: dict[str, Any]) -> None:
        words = tokenizer["model"]["vocab"]
        text = {number: word for word, number in words.items()}
        words[text[one]], words[text[other]] = other, one

    return change


def fewer(tokenizer: dict[str, Any]) -> None:
    *kept, last = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = kept
    del tokenizer["model"]["vocab"]["".join(last if isinstance(last, list) else last.split(" "))]


def added(content: str, number: int) -> Change:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"].append({"id": number, "content": content, "special": True, **flags})

    return change


def same(tokenizer: dict[str, Any]) -> None:
    """Nothing."""


@pytest.fixture
def folder(shards: ShardSet, tmp_path: Path) -> Callable[[Change], Path]:
    def make(change: Change) -> Path:
        made = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(shards.tokenizer_dir, made)
        value = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
        change(value)
        (made / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
        return made

    return make


class Served:
    """A server in this process: it reads text with ``folder``'s tokenizer, and counts the documents it is asked for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, offers: str = "prompt") -> None:
        self.tokenizer, self.offers, self.documents = Tokenizer.open(folder).backend, offers, 0
        self.tokenizer.encode_special_tokens = False
        facts = ServerFacts("m", "prompt_logprobs", 20, 64, 0.0)
        monkeypatch.setattr(openai, "probe", lambda *arguments, **more: facts)
        monkeypatch.setattr(HttpClient, "post", lambda client, path, body: self.post(client, path, body))

    def post(self, client: HttpClient, path: str, body: dict[str, Any]) -> Any:
        if path not in ("/tokenize", "/detokenize"):
            self.documents += 1
            client.failure("refused-request", "it came to a document", status=400)
        assert client.url == "http://127.0.0.1:9"
        if self.offers == "nothing":
            client.failure("model-not-found", "no such path", status=404)
        if path == "/detokenize":
            return {"prompt": self.tokenizer.decode(body["tokens"], skip_special_tokens=False)}
        text = body["prompt"] if self.offers == "prompt" else ""
        return {"tokens": self.tokenizer.encode(text, add_special_tokens=False).ids}

    def ask(self, folder: Path) -> tuple[str, list[str]]:
        """Score one document with the tokenizer of ``folder``: the failure's kind, and the log."""
        teacher = OpenAITeacher.open("http://127.0.0.1:9/v1", "m", folder)
        with pytest.raises(TeacherFailure) as caught:
            list(teacher.score([np.arange(8)], k=4, temperatures=(1.0,)))
        teacher.close()
        return caught.value.kind, list(teacher.flow.notes)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (swapped(268, 269), same),
        (swapped(70, 71), same),
        (fewer, same),
        (same, fewer),
        (added("<pad>", MANY), same),
        (same, added("<pad>", MANY)),
        (added("<pad>", MANY), added("<bos>", MANY)),
    ],
    ids=[
        "two late merges",
        "two letters",
        "one less here",
        "one less there",
        "one added here",
        "one added there",
        "another added",
    ],
)
def test_another_vocabulary_is_refused_before_a_document_is_asked_for(
    here: Change, there: Change, folder: Callable[[Change], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(folder(there), monkeypatch)
    assert served.ask(folder(here))[0] == "wrong-ids"
    assert served.documents == 0
    # Control: the folder of the server's own tokenizer is asked for its document.
    kind, notes = served.ask(folder(there))
    assert (kind, served.documents, notes) == ("refused-request", 1, [])


@pytest.mark.parametrize("offers", ["nothing", "another field"])
def test_a_server_that_does_not_say_how_it_reads_text_is_asked_and_the_log_says_so(
    offers: str, folder: Callable[[Change], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(folder(same), monkeypatch, offers=offers)
    kind, notes = served.ask(folder(same))
    assert (kind, served.documents) == ("refused-request", 1)
    assert "taken on trust" in notes[0]
