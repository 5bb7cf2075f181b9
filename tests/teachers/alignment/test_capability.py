"""What a backend cannot serve is refused when the pipeline is planned, with the reason and the next command."""

from __future__ import annotations

from typing import Any

import pytest

from latentforge.errors import RefusedError
from latentforge.spec.abilities import ABILITIES, check_abilities, needs_of
from latentforge.spec.fields import Backend
from latentforge.spec.pipeline import effective_pipeline
from latentforge.spec.sections import PipelineSpec
from latentforge.teachers.capability import require
from latentforge.teachers.fixture import FixtureTeacher

URL = "http://127.0.0.1:9/v1"


def spec_of(backend: Backend, **sections: dict[str, Any]) -> PipelineSpec:
    teacher: dict[str, Any] = {"backend": backend, "model": "/models/t"}
    if backend in ("openai", "vllm-remote", "venice"):
        teacher["url"] = URL
    if backend == "store":
        teacher["store"] = "/models/targets.sqlite"
    return PipelineSpec.model_validate({"teacher": teacher, **sections})


CHAT = {"data": {"documents": "chat"}, "score": {"k": 20}}


@pytest.mark.parametrize(
    ("backend", "sections", "said", "instead"),
    [
        ("venice", {}, r"'store' needs .* score given documents; .* 'venice' can answer chats .* alone", "documents"),
        ("venice", {"distill": {"targets": "live"}}, r"'live' needs .* score given documents", "documents"),
        ("venice", CHAT | {"distill": {"on_policy": 0.5}}, r"on_policy = 0.5 needs .* score", "on_policy = 0"),
        ("venice", CHAT | {"score": {"k": 32}}, r"score\.k = 32: a hosted chat API gives at most 20", "score.k = 20"),
        ("venice", CHAT | {"distill": {"targets": "live"}}, "cannot be asked again", "targets = 'store'"),
        ("vllm-local", CHAT | {"distill": {"on_policy": 0.5}}, r"on_policy = 0.5 with .* 'chat'", "on_policy = 0"),
        ("hf", CHAT, r"'chat' needs .* answer chats with their rows; .* 'hf' can", "documents = 'corpus'"),
        ("store", CHAT, r"'chat' needs .* answer chats", "documents = 'corpus'"),
        ("openai", CHAT | {"score": {"temperatures": (1.0, 2.0)}}, r"top-k at T = 1", "temperatures"),
        ("openai", CHAT | {"distill": {"cross_tokenizer": True}}, "read in the API's own tokens", "cross_tokenizer"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_with_what_to_do_instead(
    backend: Backend, sections: dict[str, Any], said: str, instead: str
) -> None:
    with pytest.raises(RefusedError, match=said) as caught:
        check_abilities(spec_of(backend, **sections))
    assert instead in (caught.value.next or "")


@pytest.mark.parametrize("backend", [one for one in ABILITIES if one != "venice"])
def test_what_every_scorer_can_do_is_planned(backend: Backend) -> None:
    check_abilities(spec_of(backend))


@pytest.mark.parametrize("backend", ["venice", "openai", "vllm-remote"])
def test_a_chat_api_may_feed_documents(backend: Backend) -> None:
    assert [need.ability for need in needs_of(spec_of(backend, **CHAT))] == ["chat"]
    spec, _ = effective_pipeline(spec_of(backend, **CHAT))
    assert spec.data.documents == "chat"


def test_planning_a_chat_only_teacher_for_a_corpus_is_refused() -> None:
    with pytest.raises(RefusedError, match="score given documents"):
        effective_pipeline(spec_of("venice"))


def test_an_open_teacher_is_held_to_the_same_needs() -> None:
    fixture = FixtureTeacher(64)
    require(fixture, "score", "scoring", instead="")
    with pytest.raises(RefusedError, match="answer chats with their rows; this one can give dense logits") as caught:
        require(fixture, "chat", "data.documents = 'chat'", instead="set data.documents = 'corpus'")
    assert caught.value.next == "set data.documents = 'corpus'"
