"""Sections of the latent line: the codec, what a teacher goes on with, and the student of K tokens a step."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from latentforge.spec.fields import (
    LEAST_TEMPERATURE,
    Count,
    Distributed,
    Positive,
    Section,
    Weight,
    check_attention,
    check_best,
    check_falsifiers,
    check_shares,
)


class AutoencoderSpec(Section):
    """Training of the codec of a latent student: data.chunk tokens to one vector and back."""

    latent: Count = Field(128, description="numbers of a latent (l); CALM takes 32 a token of the chunk")
    width: Count = Field(128, description="width of its layers and of its embedding")
    inner: Count = Field(320, description="inner width of its SwiGLU")
    steps: Count = 600
    batch_size: Count = Field(16, description="packed rows a step")
    micro_batch_size: Count | None = Field(None, description="rows a forward pass; the whole batch if absent")
    learning_rate: Positive = 3e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    weight_decay: Weight = 0.01
    clip_norm: Positive | None = 1.0
    token_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.15, description="share of the tokens that the encoder is not shown while it is trained"
    )
    latent_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.15, description="share of a latent's numbers that the decoder is not shown while it is trained"
    )
    kl_weight: Weight = Field(0.001, description="weight of the latents' KL to a standard normal")
    kl_floor: Weight = Field(0.5, description="nats of that KL which each dimension has for nothing (free bits)")
    distributed: Distributed = Field(
        "none", description="what spreads the training over processes: torch's DDP or FSDP2, DeepSpeed's ZeRO"
    )
    processes: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="processes on each host that share every batch; the result is that of one"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: Count = 250
    validate_every: Count | None = Field(
        None, description="measure held-out text every so many steps; before the first and after the last if absent"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="whose weights are saved: the last step's, or those of the lowest held-out loss measured"
    )
    require: tuple[str, ...] = Field(("F-LATENT-AE-001",), description="falsifiers that must pass")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_best("autoencoder", self.keep, self.validate_every, self.steps)
        check_shares("autoencoder", self, frozen=False)
        check_falsifiers(self.require, section="autoencoder")
        return self


class ContinuationsSpec(Section):
    """What a teacher goes on with after each chunk of the text: the targets of a latent student's sampled signals."""

    count: Annotated[int, Field(ge=1, le=1024)] = Field(8, description="continuations of a chunk (R)")
    temperatures: tuple[Annotated[float, Field(ge=LEAST_TEMPERATURE, le=1.0)], ...] = Field(
        (1.0,), min_length=1, description="at which they are drawn; those below 1 are for latent.tempered_weight"
    )
    batch_size: Count = Field(16, description="rows of text that the teacher continues at a time")
    rows: Count | None = Field(None, description="training rows that are continued, from the first on; all if absent")

    @model_validator(mode="after")
    def _temperatures_differ(self) -> Self:
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures {list(self.temperatures)} holds a value twice")
        return self


class LatentStudentSpec(Section):
    """The size of a latent student; the size of its chunks is the data's, that of its latents the codec's."""

    layers: Count = Field(2, description="layers of the decoder over chunks")
    hidden: Count = 128
    heads: Count = 4
    kv_heads: Count = 2
    intermediate: Count = 384
    head_blocks: Count = Field(1, description="blocks of the energy head; CALM takes a quarter of the layers")
    noise: Count = Field(64, description="numbers of noise that a draw of the energy head is made from")
    token_layers: Annotated[int, Field(ge=0, le=1024)] = Field(
        1, description="layers of the token head, which completes prompts and scores text; 0: there is none"
    )
    frozen: bool = Field(False, description="train nothing: the planted control of F-LATENT-KD-001")

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        check_attention("student", self.hidden, self.heads, self.kv_heads)
        return self


class LatentSpec(Section):
    """Training of the student that writes data.chunk tokens a step. Each signal has a weight of its own."""

    student: LatentStudentSpec = LatentStudentSpec()
    alpha: Annotated[float, Field(gt=0.0, lt=2.0)] = Field(1.0, description="power of the energy score's distances")
    draws: Annotated[int, Field(ge=2, le=4096)] = Field(8, description="draws of the head a chunk (N)")
    samples: Annotated[int, Field(ge=1, le=65_536)] = Field(
        96, description="samples of the target a chunk (M), shared out among its continuations; CALM takes 100"
    )
    text_weight: Weight = Field(1.0, description="energy score of the text's own next chunk")
    sample_weight: Weight = Field(0.0, description="energy score of what the teacher goes on with at T = 1")
    sample_continuations: Count | None = Field(
        None, description="continuations used a visit, in turns; all of continuations.count if absent"
    )
    tempered_weight: Weight = Field(
        0.0, description="energy score of continuations below T = 1, for a head that is told the temperature"
    )
    token_ce_weight: Weight = Field(1.0, description="cross-entropy of the token head on the text")
    token_kd_weight: Weight = Field(0.0, description="KL of the teacher's stored rows to the token head's")
    token_temperature: Positive = Field(1.0, description="T of that KL; one of score.temperatures")
    kl_weight: Weight = Field(
        0.0,
        description="of the first LatentForge, off: KL of the teacher's rows to K independent positions of the decoded "
        "latent, which no chunk of the teacher's is drawn from",
    )
    mse_weight: Weight = Field(
        0.0,
        description="of the first LatentForge, off: squared error to the next chunk's latent, whose best answer is the "
        "mean of all that may follow (it blurs)",
    )
    ce_weight: Weight = Field(
        0.0,
        description="of the first LatentForge, off: cross-entropy of K independent positions of the decoded latent "
        "(tokens of different continuations are mixed)",
    )
    steps: Count = 500
    batch_size: Count = Field(16, description="packed rows a step")
    micro_batch_size: Count | None = Field(None, description="rows a forward pass; the whole batch if absent")
    learning_rate: Positive = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    weight_decay: Weight = 0.01
    clip_norm: Positive | None = 1.0
    precision: Literal["fp32", "bf16"] = Field("fp32", description="'bf16' keeps fp32 master weights")
    distributed: Distributed = Field(
        "none", description="what spreads the training over processes: torch's DDP or FSDP2, DeepSpeed's ZeRO"
    )
    processes: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="processes on each host that share every batch; the result is that of one"
    )
    activation_checkpointing: bool = Field(False, description="compute activations again for the gradient: less memory")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: Count = 250
    validate_every: Count | None = Field(
        None, description="measure held-out text every so many steps; before the first and after the last if absent"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="whose weights are saved: the last step's, or those of the lowest held-out loss measured"
    )
    beside: bool = Field(False, description="train the token-level student of [distill] too, on the same data")
    require: tuple[str, ...] = Field(
        ("F-LATENT-CAUSAL-001", "F-LATENT-KD-001"), description="falsifiers that must pass"
    )

    @property
    def continues(self) -> bool:
        """Whether a signal is made of what a teacher goes on with."""
        return self.sample_weight > 0 or self.tempered_weight > 0

    @property
    def takes_rows(self) -> bool:
        """Whether a signal is made of a teacher's stored rows."""
        return self.token_kd_weight > 0 or self.kl_weight > 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        of_head = ("text", "sample", "tempered", "kl", "mse", "ce")
        weights = [getattr(self, f"{name}_weight") for name in (*of_head, "token_ce", "token_kd")]
        if not math.isfinite(sum(weights)):
            raise ValueError("the sum of the weights is not finite")
        if not any(weights[: len(of_head)]):
            raise ValueError(
                "text_weight, sample_weight and tempered_weight are 0: nothing would train the head that draws chunks"
            )
        has_head, trained = self.student.token_layers > 0, self.token_ce_weight > 0 or self.token_kd_weight > 0
        if has_head and not trained:
            raise ValueError(
                f"student.token_layers = {self.student.token_layers}, and token_ce_weight and token_kd_weight are 0: "
                "the token head would not be trained; give one a weight or set token_layers = 0"
            )
        if trained and not has_head:
            raise ValueError(
                "token_ce_weight or token_kd_weight is above 0, and student.token_layers = 0: there is no token head"
            )
        check_shares("latent", self, frozen=self.student.frozen)
        used = self.sample_continuations
        if self.continues and used is not None and self.samples % used:
            raise ValueError(
                f"samples = {self.samples} cannot be shared out evenly among sample_continuations = {used}"
            )
        check_best("latent", self.keep, self.validate_every, self.steps)
        check_falsifiers(self.require, section="latent")
        return self
