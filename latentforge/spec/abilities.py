"""What a pipeline needs of its teacher against what each backend can do: refused when it is planned, with the reason.

Nothing is asked here: this is what a backend declares. What a server really does is found out when it is asked first
(``latentforge teacher check``), and recipes hold the open teacher to the same needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latentforge.errors import RefusedError
from latentforge.spec.fields import Backend
from latentforge.spec.sections import DistillSpec, PipelineSpec

Ability = Literal["score", "sample", "logits", "chat"]

CHAT_K = 20
"""Entries a position that hosted chat APIs give at most (OpenAI's ``top_logprobs``)."""

ABILITIES: dict[Backend, frozenset[Ability]] = {
    "hf": frozenset({"score", "sample", "logits"}),
    "fixture": frozenset({"score", "sample", "logits"}),
    "store": frozenset({"score"}),
    "openai": frozenset({"score", "sample", "chat"}),
    "vllm-remote": frozenset({"score", "sample", "chat"}),
    "vllm-local": frozenset({"score", "sample", "chat"}),
    "vllm-local-inproc": frozenset({"score"}),
    "venice": frozenset({"chat"}),
}
"""By backend; what ``auto`` comes to is decided before this is asked."""

MEANING: dict[Ability, str] = {
    "score": "score given documents",
    "sample": "continue a raw text",
    "logits": "give dense logits at any T",
    "chat": "answer chats with their rows",
}


@dataclass(frozen=True)
class Need:
    """One thing that a run asks of its teacher: an ability, the field that asks for it, and what to do without it."""

    ability: Ability
    field: str
    instead: str


def needs_of(spec: PipelineSpec) -> tuple[Need, ...]:
    """What the runs of a pipeline ask of their teacher."""
    found: list[Need] = []
    if _chats(spec):
        found.append(Need("chat", "data.documents = 'chat'", "set data.documents = 'corpus'"))
    if spec.through == "latent":
        found += _needs_of_latent(spec)
    if spec.distils:
        found += _needs_of_distill(spec)
    return tuple(found)


def _chats(spec: PipelineSpec) -> bool:
    """Whether the text is a chat API's answers, which come with their rows: none is scored afterwards."""
    return spec.data.documents == "chat"


def _needs_of_latent(spec: PipelineSpec) -> list[Need]:
    latent, found = spec.latent, []
    for name in () if _chats(spec) else ("token_kd_weight", "kl_weight"):
        if (weight := getattr(latent, name)) > 0:
            other = f"set latent.{name} = 0, or use a backend that scores (vllm-remote, hf)"
            found.append(Need("score", f"latent.{name} = {weight:g}", other))
    for name in ("sample_weight", "tempered_weight"):
        if (weight := getattr(latent, name)) > 0:
            other = f"set latent.{name} = 0, or use a backend that samples (vllm-remote, hf)"
            found.append(Need("sample", f"latent.{name} = {weight:g}", other))
    if spec.score.mode == "sample" and latent.takes_rows:
        found.append(Need("logits", "score.mode = 'sample'", "set score.mode = 'topk', or teacher.backend = 'hf'"))
    return found


def _needs_of_distill(spec: PipelineSpec) -> list[Need]:
    distill, found = spec.distill, []
    if not _chats(spec) and (distill.kd_weight > 0 or distill.targets == "store"):
        other = "set data.documents = 'chat' to train on its answers, or use a backend that scores (vllm-remote, hf)"
        found.append(Need("score", f"distill.targets = {distill.targets!r}", other))
    if distill.on_policy > 0:
        other = "set distill.on_policy = 0, or use a backend that scores (vllm-remote, hf)"
        found.append(Need("score", f"distill.on_policy = {distill.on_policy:g}", other))
    if spec.score.mode == "sample" and distill.targets == "store" and not _chats(spec):
        found.append(Need("logits", "score.mode = 'sample'", "set score.mode = 'topk', or teacher.backend = 'hf'"))
    if distill.temperature != 1.0 and distill.targets == "live":
        other = "set distill.temperature = 1, or teacher.backend = 'hf'"
        found.append(Need("logits", f"distill.temperature = {distill.temperature:g} with live targets", other))
    return found


def check_abilities(spec: PipelineSpec) -> None:
    """Refuse a pipeline whose teacher's backend lacks what its runs need; ``backend`` must be decided, not ``auto``."""
    backend = spec.teacher.backend
    able = ABILITIES.get(backend)
    if able is None:
        return
    for need in needs_of(spec):
        if need.ability not in able:
            can = ", ".join(MEANING[one] for one in sorted(able))
            raise RefusedError(
                f"{need.field} needs a teacher that can {MEANING[need.ability]}; teacher.backend = {backend!r} can "
                f"{can} alone",
                next=need.instead,
            )
    if _chats(spec):
        _check_chat(spec)


def _check_chat(spec: PipelineSpec) -> None:
    """What the answers of a chat cannot give: dense or live rows, another T, more entries than the API has."""
    score = spec.score
    if spec.distils:
        _check_chat_of_distill(spec.distill)
    if score.temperatures != (1.0,) or score.mode != "topk":
        raise RefusedError(
            f"score.temperatures = {list(score.temperatures)}, score.mode = {score.mode!r} with data.documents = "
            "'chat': an answer's rows are top-k at T = 1",
            next="set score.temperatures = [1.0] and score.mode = 'topk'",
        )
    if score.k > CHAT_K and spec.teacher.backend == "venice":
        raise RefusedError(
            f"score.k = {score.k}: a hosted chat API gives at most {CHAT_K} entries a position",
            next=f"set score.k = {CHAT_K}",
        )


def _check_chat_of_distill(distill: DistillSpec) -> None:
    if distill.targets == "live":
        raise RefusedError(
            "distill.targets = 'live' with data.documents = 'chat': an answer's rows come with it, and cannot be asked "
            "again",
            next="set distill.targets = 'store'",
        )
    if distill.temperature != 1.0:
        raise RefusedError(
            f"distill.temperature = {distill.temperature:g} with data.documents = 'chat': an answer's rows have T = 1",
            next="set distill.temperature = 1",
        )
    if distill.on_policy > 0.0:
        raise RefusedError(
            f"distill.on_policy = {distill.on_policy:g} with data.documents = 'chat': the student goes on with answers "
            "without the prompts, of which a teacher that is not asked in a chat says something else",
            next="set distill.on_policy = 0",
        )
    if distill.cross_tokenizer:
        raise RefusedError(
            "distill.cross_tokenizer with data.documents = 'chat': the answers are read in the API's own tokens",
            next="set distill.cross_tokenizer = false and name the API's tokenizer in teacher.model",
        )
