"""What a user may ask for: the sections of a pipeline file, each field with its meaning and bounds."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from latentforge.spec.agreement import check_agreement
from latentforge.spec.bench import BenchSpec
from latentforge.spec.endurance import EnduranceSpec
from latentforge.spec.fields import (
    Backend,
    Count,
    Distributed,
    EnvironmentName,
    Positive,
    Profile,
    Section,
    Seed,
    Weight,
    check_attention,
    check_best,
    check_falsifiers,
    check_shares,
)
from latentforge.spec.latent import AutoencoderSpec, ContinuationsSpec, LatentSpec
from latentforge.spec.lora import LoraSpec
from latentforge.spec.url import check_url


class DataSpec(Section):
    """Corpus, tokenizer and packing."""

    corpus: str = Field("stdlib", min_length=1, description="'stdlib', a folder, a .txt or a .jsonl file")
    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = Field(
        2048, description="size of the byte-level BPE to train; ignored where the teacher brings its tokenizer"
    )
    sequence_length: Annotated[int, Field(ge=8, le=131_072)] = Field(128, description="tokens a packed row")
    train_sequences: Count | None = Field(None, description="packed training rows to keep; all of the corpus if absent")
    heldout_sequences: Count = Field(64, description="packed rows of the fixed held-out split")
    documents: Literal["corpus", "chat"] = Field(
        "corpus", description="'chat' = the teacher's answers to the corpus's prompts are the documents"
    )
    answer_tokens: Annotated[int, Field(ge=1, le=131_072)] = Field(
        256, description="documents = 'chat': tokens at which an answer is cut"
    )
    bos: Literal["none", "add"] = Field("none", description="'add' puts the tokenizer's BOS before each document")
    chunk: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="tokens a chunk (K) of a latent student: each document begins at a multiple of it"
    )

    @model_validator(mode="after")
    def _rows_hold_whole_chunks(self) -> Self:
        if self.sequence_length % self.chunk:
            raise ValueError(
                f"sequence_length = {self.sequence_length} is not a multiple of chunk = {self.chunk}: a row would end "
                "inside a chunk"
            )
        return self


class TeacherSpec(Section):
    """A teacher: who answers and how it is reached; a folder that exists, or a small model to train on the corpus."""

    model: str | None = Field(
        None,
        min_length=1,
        description="Hugging Face folder, or repo@commit in the hub cache; a server needs no weights in it",
    )
    backend: Backend = Field("auto", description="where answers come from; 'auto' chooses and says why")
    url: str | None = Field(None, description="an OpenAI-compatible server's base, like http://host:8000/v1")
    served_model: str | None = Field(None, min_length=1, description="the model's name there; absent: the only one")
    revision: str | None = Field(None, min_length=1, description="what pins a served model: it has no folder to hash")
    api_key_env: EnvironmentName | None = Field(None, description="NAME of the variable that holds the key")
    precision: Literal["auto", "fp32", "bf16", "quantized"] = Field(
        "auto", description="how the teacher computes; 'auto' = the path that really runs on the GPU, measured"
    )
    quantization: str | None = Field(None, min_length=1, description="vllm-local: the engine's --quantization")
    max_model_len: Annotated[int, Field(ge=8, le=1_048_576)] = Field(
        16_384, description="vllm-local: longest sequence that the engine makes room for, in tokens"
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.8, description="vllm-local: share of the GPU's memory that the engine may take"
    )
    environment: str | None = Field(None, min_length=1, description="vllm-local: folder of vLLM's own environment")
    store: str | None = Field(None, min_length=1, description="backend 'store': a file of targets that was scored")
    cache: str | None = Field(None, min_length=1, description="file of answers, asked before the teacher is")
    cache_readonly: bool = Field(False, description="never write to the cache, as --kd-cache-ro asks")
    concurrency: Annotated[int, Field(ge=1, le=256)] = Field(8, description="requests in flight at once")
    timeout: Positive = Field(60.0, description="seconds that one request may take")
    max_requests: Count | None = Field(None, description="budget of requests of a run, retries included")
    max_tokens: Count | None = Field(None, description="budget of tokens sent and received of a run")
    layers: Count = 3
    hidden: Count = 128
    heads: Count = 4
    kv_heads: Count = 2
    intermediate: Count = 384
    steps: Count = 300
    batch_size: Count = 16
    learning_rate: Positive = 2e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    checkpoint_every: Count = 250
    validate_every: Count | None = Field(
        None, description="measure held-out text every so many steps; before the first and after the last if absent"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="whose weights are saved: the last step's, or those of the lowest held-out loss measured"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_best("teacher", self.keep, self.validate_every, self.steps)
        check_attention("teacher", self.hidden, self.heads, self.kv_heads)
        if self.url is not None:
            check_url(self.url)
        if self.backend in ("openai", "vllm-remote") and self.url is None:
            also = " (nor does VLLM_REMOTE_URL)" if self.backend == "vllm-remote" else ""
            raise ValueError(f"backend = {self.backend!r} is a server, and url names none{also}")
        if self.backend == "store" and self.store is None:
            raise ValueError("backend = 'store' reads a file of targets, and store names none")
        if self.cache_readonly and self.cache is None:
            raise ValueError("cache_readonly = true, and cache names no file")
        return self


class ScoreSpec(Section):
    """Scoring of the teacher into the store of targets."""

    k: Annotated[int, Field(ge=1, le=262_144)] = Field(32, description="entries kept a position")
    temperatures: tuple[Positive, ...] = Field((1.0,), min_length=1, description="T for which exact tails are stored")
    batch_size: Count = 16
    mode: Literal["topk", "sample"] = Field("topk", description="'sample' = ids drawn from the teacher: unbiased")
    draws: Annotated[int, Field(ge=1, le=65_536)] = Field(50, description="mode 'sample': ids drawn a position")
    rounding: Literal["fine", "none"] = Field("fine", description="'none' = store log-probabilities as exact float32")
    ttl_days: Annotated[float, Field(gt=0.0, le=1e9)] | None = Field(
        None, description="how long a stored row is good; for ever if absent"
    )
    max_bytes: Annotated[int, Field(ge=65_536, lt=2**53)] | None = Field(
        None, description="size of the store from which the oldest used rows go"
    )

    @model_validator(mode="after")
    def _temperatures_differ(self) -> Self:
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures {list(self.temperatures)} holds a value twice")
        if self.mode == "sample" and self.temperatures != (1.0,):
            raise ValueError(f"mode = 'sample' draws at T = 1, and temperatures is {list(self.temperatures)}")
        return self


class StudentSpec(Section):
    """A token-level student: a folder to start from, or the size of a new model."""

    init: str | None = Field(None, min_length=1, description="Hugging Face folder to start from")
    layers: Count = 2
    hidden: Count = 64
    heads: Count = 4
    kv_heads: Count = 2
    intermediate: Count = 192
    frozen: bool = Field(False, description="train nothing: the planted control of F-DISTILL-SMOKE-001")

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        check_attention("student", self.hidden, self.heads, self.kv_heads)
        return self


class DistillSpec(Section):
    """Training of the token-level student."""

    student: StudentSpec = StudentSpec()
    lora: LoraSpec = LoraSpec()
    targets: Literal["store", "live"] = Field("store", description="'live' = dense logits of a teacher in process")
    steps: Count = 500
    batch_size: Count = 16
    micro_batch_size: Count | None = Field(None, description="rows a forward pass; the whole batch if absent")
    learning_rate: Positive = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    weight_decay: Weight = 0.01
    clip_norm: Positive | None = 1.0
    precision: Literal["fp32", "bf16"] = Field("fp32", description="'bf16' keeps fp32 master weights")
    temperature: Positive = 1.0
    ce_weight: Weight = 0.3
    kd_weight: Weight = 0.7
    direction: Literal["forward"] = "forward"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    distributed: Distributed = Field(
        "none", description="what spreads the training over processes: torch's DDP or FSDP2, DeepSpeed's ZeRO"
    )
    processes: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="processes on each host that share every batch; the result is that of one"
    )
    activation_checkpointing: bool = Field(False, description="compute activations again for the gradient: less memory")
    checkpoint_every: Count = 250
    validate_every: Count | None = Field(
        None, description="measure held-out text every so many steps; before the first and after the last if absent"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="whose weights are saved: the last step's, or those of the lowest held-out loss measured"
    )
    prefetch: Annotated[int, Field(ge=0, le=64)] = Field(2, description="batches whose targets are fetched ahead")
    compile: bool = Field(
        False, description="torch.compile the student's layers for its training steps; on a CPU that needs g++"
    )
    on_teacher_loss: Literal["stop", "degrade"] = Field(
        "stop", description="'degrade' goes on without KD where the teacher is lost, and reports the coverage"
    )
    on_policy: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="share of batches whose text the student writes and the teacher scores (GKD)"
    )
    on_policy_tokens: Count = Field(32, description="tokens that the student writes after a prefix")
    on_policy_temperature: Positive = Field(1.0, description="temperature at which the student writes")
    cross_tokenizer: bool = Field(False, description="align a teacher of another tokenizer by byte spans")
    min_coverage: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.9, description="share of aligned spans below which a teacher of another tokenizer is refused"
    )
    require: tuple[str, ...] = Field((), description="falsifiers that must pass")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ce_weight == 0.0 and self.kd_weight == 0.0:
            raise ValueError("ce_weight = 0 and kd_weight = 0: nothing would be trained; give one of them a weight")
        if not math.isfinite(self.ce_weight + self.kd_weight):
            raise ValueError("ce_weight + kd_weight is not finite")
        check_best("distill", self.keep, self.validate_every, self.steps)
        check_shares("distill", self, frozen=self.student.frozen)
        self._taught_together()
        if self.lora.rank:
            self._adapts()
        self._compiled_alone()
        check_falsifiers(self.require, section="distill")
        return self

    def _adapts(self) -> None:
        """Refuse adapters of what has nothing to be adapted, or that nothing would train."""
        asked = f"lora.rank = {self.lora.rank}"
        if self.student.init is None:
            raise ValueError(
                f"{asked} of a student that starts from nothing: there is nothing to adapt; set student.init to a "
                "folder, or lora.rank = 0"
            )
        if self.student.frozen:
            raise ValueError(f"{asked} with student.frozen = true: its adapters would not be trained")
        if self.distributed != "none":
            raise ValueError(
                f"{asked} with distributed = {self.distributed!r}: adapters are trained by one process; set "
                "distributed = 'none', or lora.rank = 0"
            )

    def _taught_together(self) -> None:
        """Refuse a teacher that several processes would each hold, or ask."""
        if self.distributed == "none":
            return
        if self.targets == "live":
            raise ValueError(
                f"distributed = {self.distributed!r} with targets = 'live': each process would hold or ask a teacher "
                "of its own; set targets = 'store', or distributed = 'none'"
            )
        if self.on_policy > 0.0:
            raise ValueError(
                f"distributed = {self.distributed!r} with on_policy = {self.on_policy:g}: the processes do not write "
                "text together; set on_policy = 0, or distributed = 'none'"
            )

    def _compiled_alone(self) -> None:
        """Refuse what compiled layers are not proven with."""
        if not self.compile:
            return
        if self.distributed != "none":
            raise ValueError(
                f"compile = true with distributed = {self.distributed!r}: compiled layers are proven on one process; "
                "set compile = false, or distributed = 'none'"
            )
        if self.activation_checkpointing:
            raise ValueError(
                "compile = true with activation_checkpointing = true: layers that are computed again for the gradient "
                "are not proven compiled; set one of them to false"
            )
        if self.lora.rank:
            raise ValueError(
                f"compile = true with lora.rank = {self.lora.rank}: adapted layers are not proven compiled; set "
                "compile = false, or lora.rank = 0"
            )
        if self.on_policy > 0.0:
            raise ValueError(
                f"compile = true with on_policy = {self.on_policy:g}: a step has another number of rows each time, and "
                "would be compiled anew; set compile = false, or on_policy = 0"
            )


Goal = Literal["distill", "autoencoder", "latent"]
"""What a pipeline may be for: its last run."""


class PipelineSpec(Section):
    """A whole pipeline file: data → teacher → score → distill, data → autoencoder, or both with a latent student."""

    profile: Profile = "smoke"
    seed: Seed = 7
    through: Goal = Field("distill", description="the run that the pipeline is for: it is made, and what it needs")
    data: DataSpec = DataSpec()
    teacher: TeacherSpec = TeacherSpec()
    score: ScoreSpec = ScoreSpec()
    distill: DistillSpec = DistillSpec()
    autoencoder: AutoencoderSpec = AutoencoderSpec()
    continuations: ContinuationsSpec = ContinuationsSpec()
    latent: LatentSpec = LatentSpec()
    bench: BenchSpec = BenchSpec()
    endurance: EnduranceSpec = EnduranceSpec()
    secrets: tuple[EnvironmentName, ...] = Field(
        (),
        max_length=16,
        description="names of the laptop's environment variables that the runs are given; never their values",
    )

    @property
    def distils(self) -> bool:
        """Whether a token-level student is trained: for itself, or beside a latent one."""
        return self.through == "distill" or (self.through == "latent" and self.latent.beside)

    @property
    def scores(self) -> bool:
        """Whether a run writes a teacher's rows into a store of its own."""
        wanted = self.distils and self.distill.targets == "store"
        wanted = wanted or (self.through == "latent" and self.latent.takes_rows)
        return wanted and self.teacher.backend != "store" and self.data.documents != "chat"

    @property
    def continues(self) -> bool:
        """Whether a run asks a teacher how the text goes on."""
        return self.through == "latent" and self.latent.continues

    @property
    def has_teacher(self) -> bool:
        """Whether any run takes more of a teacher than its tokenizer."""
        asked = self.distils or self.scores or self.continues or self.data.documents == "chat"
        return asked or (self.through == "latent" and self.latent.takes_rows)

    @property
    def benches(self) -> bool:
        """Whether the student is measured as it writes, by a run after its own; a codec writes nothing."""
        return self.through != "autoencoder" and (self.bench.measure or bool(self.bench.gates))

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        check_agreement(self)
        return self
