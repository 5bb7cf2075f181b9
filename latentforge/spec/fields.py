"""What the sections of a pipeline file are made of: bounded values, and the checks that several sections share."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

Profile = Literal["smoke", "full"]
Seed = Annotated[int, Field(ge=0, lt=2**53)]
Count = Annotated[int, Field(ge=1, lt=2**53)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]
Distributed = Literal["none", "ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

Backend = Literal[
    "auto", "hf", "openai", "venice", "vllm-remote", "vllm-local", "vllm-local-inproc", "store", "fixture"
]
"""Where a teacher's answers come from; ``venice`` and ``vllm-remote`` are ``openai`` with names of their own."""

HTTP_BACKENDS: tuple[Backend, ...] = ("openai", "venice", "vllm-remote")
"""Servers that somebody else runs: of the teacher's folder only the tokenizer and config.json are needed."""

RUN_FALSIFIERS = (
    "F-DISTILL-SMOKE-001",
    "F-DISTILL-SMOKE-002",
    "F-DISTILL-PIPELINE-001",
    "F-DISTILL-CANARY-001",
    "F-EFFECTIVE-CONFIG-001",
    "F-EFFECTIVE-LR-001",
    "F-BATCH-ROWS-001",
    "F-ARTEFACT-SIZE-001",
    "F-ARTEFACT-MOVED-001",
    "F-ARTEFACT-FROZEN-001",
    "F-KERNEL-NOJIT-001",
    "F-TEACHER-COVERAGE-001",
    "F-LATENT-AE-001",
    "F-LATENT-AE-002",
    "F-LATENT-CAUSAL-001",
    "F-LATENT-KD-001",
    "F-LATENT-CANARY-001",
)
"""What a run can judge of itself (in ``latentforge.train.falsifiers``), so what ``require`` of a section may name."""

_JUDGED_BY = {
    "F-DISTILL-": "distill",
    "F-LATENT-AE-": "autoencoder",
    "F-LATENT-CAUSAL-": "latent",
    "F-LATENT-KD-": "latent",
    "F-LATENT-CANARY-": "latent",
}
"""The section whose runs alone have what such a falsifier looks at."""

LEAST_TEMPERATURE = 1e-4
"""The lowest temperature above 0 at which tokens can be drawn (``kernels.decode``)."""


class Section(BaseModel):
    """A frozen table of a pipeline file; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shared(Protocol):
    """A section whose batches processes share."""

    @property
    def distributed(self) -> Distributed: ...
    @property
    def processes(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def micro_batch_size(self) -> int | None: ...


def check_shares(section: str, of: Shared, *, frozen: bool) -> None:
    """Refuse (ValueError) processes that could not train together, each on its share of a batch, and passes of more
    rows than the largest share has."""
    if of.micro_batch_size is not None and of.micro_batch_size > of.batch_size:
        raise ValueError(f"micro_batch_size {of.micro_batch_size} is larger than batch_size {of.batch_size}")
    if of.distributed == "none" and of.processes > 1:
        raise ValueError(
            f"processes = {of.processes} with distributed = 'none': they would not train together; set "
            f"{section}.distributed = 'ddp', or leave processes out"
        )
    if of.distributed != "none" and frozen:
        raise ValueError(f"distributed = {of.distributed!r} with a frozen student: there is nothing to train together")
    if of.processes > of.batch_size:
        raise ValueError(f"processes = {of.processes} with batch_size = {of.batch_size}: some would never have a row")
    share = -(-of.batch_size // of.processes)
    if of.micro_batch_size is not None and of.micro_batch_size > share:
        raise ValueError(
            f"micro_batch_size = {of.micro_batch_size} is more than the {share} rows that each of {of.processes} "
            f"processes has of batch_size = {of.batch_size}"
        )


def check_attention(what: str, hidden: int, heads: int, kv_heads: int) -> None:
    """Refuse (ValueError) a width that its heads do not share."""
    if hidden % heads or (hidden // heads) % 2:
        raise ValueError(f"{what}: hidden {hidden} does not split into {heads} heads of an even size")
    if heads % kv_heads:
        raise ValueError(f"{what}: {heads} heads do not share {kv_heads} kv_heads evenly")


def check_falsifiers(require: tuple[str, ...], *, section: str) -> None:
    """Refuse (ValueError) a falsifier that no run of ``section`` can judge of itself."""
    for falsifier in require:
        owner = next((other for prefix, other in _JUDGED_BY.items() if falsifier.startswith(prefix)), section)
        if falsifier not in RUN_FALSIFIERS:
            near = get_close_matches(falsifier, RUN_FALSIFIERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(RUN_FALSIFIERS)
            raise ValueError(f"require names {falsifier!r}, a falsifier that no run can judge; {hint}")
        if owner != section:
            raise ValueError(
                f"require names {falsifier!r}, which a run of [{owner}] judges, and one of [{section}] cannot"
            )


def check_best(section: str, keep: str, validate_every: int | None, steps: int) -> None:
    """Refuse (ValueError) a best step among none: held-out text is then measured after the last one alone."""
    if keep == "best" and (validate_every is None or validate_every >= steps):
        raise ValueError(
            f"keep = 'best' with validate_every = {validate_every} and steps = {steps}: held-out text is measured "
            f"after one step alone, the last; set {section}.validate_every below {section}.steps"
        )
