"""The section of a pipeline that says how the student's writing is measured, and what must hold of it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from latentforge.spec.fields import LEAST_TEMPERATURE, Count, Positive, Section


class BenchSpec(Section):
    """How a student that writes is measured, by ``latentforge bench generate`` and by a pipeline's bench run, and the
    gates that it must pass.

    A gate that is absent is not asked; one that is set and fails, or whose value is not known, fails the bench. A
    pipeline in which one is set has a bench run after its student's.
    """

    measure: bool = Field(False, description="a bench run after the student's, also where no gate is set")
    prompts: Count = Field(8, description="pieces of held-out text that a bench run lets the student go on with")
    prompt_tokens: Count = Field(16, description="tokens of such a piece, at most; whole chunks of them")
    transformers: bool = Field(False, description="also transformers' own generate, with each token-level student")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_tokens: Count = Field(64, description="tokens written after each prompt, fewer where a text ends before")
    temperature: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    method: Literal["head", "exact", "vote", "tokens"] = Field(
        "head", description="how a chunk is chosen: one draw, by rejection, the most frequent of many, or by tokens"
    )
    draws: Count = Field(200, description="methods 'exact' and 'vote': draws a chunk, at most or exactly")
    top_k: Count | None = Field(None, description="method 'tokens': the likeliest tokens that one is drawn from")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="method 'tokens': of these the fewest that have this share"
    )
    batch: Count = Field(1, description="prompts written together")
    repeats: Annotated[int, Field(ge=1, le=1000)] = Field(3, description="rounds in which everybody has a turn")
    quality_rows: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="held-out rows on which a bench run measures BrierLM and bits a byte too; 0: it does not"
    )
    min_tokens_per_second: Positive | None = Field(None, description="gate: produced tokens/s, the rounds' median")
    max_p95_first_chunk_s: Positive | None = Field(None, description="gate: seconds to the first chunk of a text")
    max_p95_chunk_s: Positive | None = Field(None, description="gate: seconds from a chunk to the next one")
    min_hit_rate: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="gate: share of the run's answers that a cache gave, 0.8 say; of a run after warm-up"
    )
    max_peak_memory_gb: Positive | None = Field(
        None, description="gate: peak of process and GPU together in GB of 10^9 bytes, 100 say"
    )

    @property
    def gates(self) -> dict[str, float]:
        """The gates that are set, by their field's name."""
        names = (
            "min_tokens_per_second",
            "max_p95_first_chunk_s",
            "max_p95_chunk_s",
            "min_hit_rate",
            "max_peak_memory_gb",
        )
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def check_rows(self, rows: int, *, length: int, chunk: int) -> None:
        """Refuse (ValueError) what ``rows`` held-out rows of ``length`` tokens in chunks of ``chunk`` cannot hold.

        Whether enough of them begin with text is not known before they are packed.
        """
        for name, asked in (("prompts", self.prompts), ("quality_rows", self.quality_rows)):
            if asked > rows:
                raise ValueError(f"bench.{name} = {asked} is more than data.heldout_sequences = {rows}")
        if self.quality_rows == 0:
            return
        begin, more = max(1, self.prompt_tokens // chunk) * chunk, -(-self.max_tokens // chunk) * chunk
        # Each begins with a row of its own and may go on into those that follow (writers.quality).
        room = max(0, rows - -(-(begin + more) // length) + 1)
        if self.prompts > room:
            raise ValueError(
                f"bench.quality_rows = {self.quality_rows} with {self.prompts} texts of {begin} + {more} tokens: "
                f"{rows} rows of {length} tokens hold {room} at most; lower bench.prompts or bench.max_tokens, or "
                "raise data.heldout_sequences"
            )

    @model_validator(mode="after")
    def _method_knows_the_rest(self) -> Self:
        if self.method == "exact" and self.temperature == 0:
            raise ValueError("temperature = 0 with method = 'exact': a rejection knows temperatures above 0")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature = {self.temperature} is neither 0 nor at least {LEAST_TEMPERATURE:g}")
        times = 1 / self.temperature if self.temperature else 1.0
        if self.method == "vote" and abs(times - round(times)) > 1e-6:
            raise ValueError(f"temperature = {self.temperature} with method = 'vote', which knows 0 and 1/n")
        whole = int(times + 1e-6)
        if self.method in ("exact", "vote") and self.draws < whole:
            raise ValueError(
                f"draws = {self.draws} with temperature = {self.temperature} and method = {self.method!r}: a chunk "
                f"must come {whole} times"
            )
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None and self.method != "tokens":
                raise ValueError(f"{name} = {value} with method = {self.method!r}: method 'tokens' alone knows it")
        return self
