"""What is measured of a pipeline: refused where that would not be the step that its run takes."""

from __future__ import annotations

from pathlib import Path

from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import RefusedError
from latentforge.spec.sections import PipelineSpec


def measurable(spec: PipelineSpec) -> PipelineSpec:
    """``spec`` with the vocabulary that its data will have: that of the teacher's tokenizer where a folder is named.

    RefusedError where the pipeline trains no token-level student, where its step is another one than is measured (one
    process, stored top-k rows at T = 1, the data's own text), or where the teacher's tokenizer is not on this machine.
    """
    distill = spec.distill
    if not spec.distils:
        raise RefusedError(
            f"through = {spec.through!r} trains no token-level student, and no other step is measured",
            next="name a recipe that does:  latentforge bench train smoke",
        )
    if distill.kd_weight == 0:
        raise RefusedError("distill.kd_weight = 0: there is no KD to be measured", next="--set distill.kd_weight=0.7")
    asked = {
        "distill.distributed": (distill.distributed, "none"),
        "distill.processes": (distill.processes, 1),
        "distill.targets": (distill.targets, "store"),
        "distill.temperature": (distill.temperature, 1.0),
        "distill.on_policy": (distill.on_policy, 0.0),
        "distill.cross_tokenizer": (distill.cross_tokenizer, False),
        "distill.student.frozen": (distill.student.frozen, False),
        "distill.lora.rank": (distill.lora.rank, 0),
        "distill.activation_checkpointing": (distill.activation_checkpointing, False),
        "score.mode": (spec.score.mode, "topk"),
    }
    other = {field: both for field, both in asked.items() if both[0] != both[1]}
    if other:
        raise RefusedError(
            "another step than this is measured: " + ", ".join(f"{name} = {it!r}" for name, (it, _) in other.items()),
            next=" ".join(f"--set {field}={str(measured).lower()}" for field, (_, measured) in other.items()),
        )
    if spec.teacher.model is None:
        return spec
    folder = Path(spec.teacher.model)
    if not folder.is_dir():
        raise RefusedError(
            f"teacher.model = {spec.teacher.model!r} is no folder here, and its tokenizer is the student's vocabulary",
            next="measure where the folder is, or:  --set teacher.model=FOLDER",
        )
    data = spec.data.model_copy(update={"vocab_size": Tokenizer.open(folder).vocab_size})
    return spec.model_copy(update={"data": data})
