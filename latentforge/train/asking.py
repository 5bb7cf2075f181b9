"""What a teacher that answers while the student trains must be able to do: refused before the first step."""

from __future__ import annotations

from latentforge.data.shards import ShardSet
from latentforge.errors import RefusedError
from latentforge.spec.sections import DistillSpec
from latentforge.teachers.protocol import Scorer
from latentforge.teachers.store import StoreTeacher

IN_PROCESS = 'set teacher.backend = "hf" and name a folder with the teacher\'s weights in teacher.model'


def answers_dense(source: Scorer) -> bool:
    """Whether a teacher gives dense logits, which serve any temperature; else it gives top-k rows."""
    return "logits" in source.capabilities


def check_live(source: Scorer, spec: DistillSpec, data: ShardSet, *, k: int | None) -> None:
    """Refuse a teacher that cannot give the targets that ``spec`` wants; ``k`` None where they are dense."""
    if answers_dense(source):
        return
    if "score" not in source.capabilities:
        able = ", ".join(sorted(source.capabilities)) or "nothing"
        raise RefusedError(
            f'distill.targets = "live" needs a teacher that scores given tokens; this one can: {able}',
            next='set data.documents = "chat" to train on its answers, or use a backend that scores',
        )
    limits = source.limits
    if limits.temperatures is not None and spec.temperature not in limits.temperatures:
        can = ", ".join(f"{t:g}" for t in limits.temperatures)
        raise RefusedError(
            f"distill.temperature = {spec.temperature:g}: this teacher answers with rows at T = {can} only, and has no "
            "dense logits from which another T could be had",
            next=f"set distill.temperature = {can.split(', ')[0]}; or {IN_PROCESS}",
        )
    assert k is not None
    limits.check(k=k, tokens=data.sequence_length, temperatures=(spec.temperature,))


def check_on_policy(source: Scorer, spec: DistillSpec, data: ShardSet) -> None:
    """Refuse a share of the student's own text that no teacher would judge, or that has no room in a row."""
    if spec.on_policy == 0.0:
        return
    asked = f"distill.on_policy = {spec.on_policy:g}"
    if isinstance(source, StoreTeacher):
        raise RefusedError(
            f"{asked}: the student's own text must be judged while it trains, and a store holds rows of the data alone",
            next='set distill.targets = "live" with a teacher that scores (hf, or a server), or distill.on_policy = 0',
        )
    if spec.cross_tokenizer:
        raise RefusedError(
            f"{asked} and distill.cross_tokenizer: where a teacher of another tokenizer has no row, the student's own "
            "text would have neither label nor targets",
            next="use a teacher of the student's tokenizer, or set distill.on_policy = 0",
        )
    if not {"logits", "score"} & set(source.capabilities):
        raise RefusedError(
            f"{asked}: the student's own text must be scored, and this teacher cannot score given tokens",
            next="use a backend that scores, or set distill.on_policy = 0",
        )
    if spec.kd_weight == 0.0:
        raise RefusedError(
            f"{asked} and distill.kd_weight = 0: the student's own text has no labels, so nothing would come of it",
            next="give distill.kd_weight a value, or set distill.on_policy = 0",
        )
    if spec.on_policy_tokens >= data.sequence_length:
        raise RefusedError(
            f"distill.on_policy_tokens = {spec.on_policy_tokens} leaves no beginning of a row of "
            f"{data.sequence_length} tokens",
            next=f"set distill.on_policy_tokens = {data.sequence_length - 1} or less",
        )
