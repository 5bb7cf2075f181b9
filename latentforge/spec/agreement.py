"""What the sections of a pipeline file have to agree on: each is sound by itself, and together they could not run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from latentforge.spec.fields import HTTP_BACKENDS, Shared

if TYPE_CHECKING:
    from latentforge.spec.sections import PipelineSpec


def check_agreement(spec: PipelineSpec) -> None:
    """Refuse (ValueError) a pipeline whose sections cannot be run together."""
    if len(set(spec.secrets)) != len(spec.secrets):
        raise ValueError(f"secrets = {list(spec.secrets)} names one twice")
    spread: dict[str, Shared | Literal[False]] = {"distill": spec.distils and spec.distill}
    spread["latent"] = spec.through == "latent" and spec.latent
    spread["autoencoder"] = spec.through != "distill" and spec.autoencoder
    for name, section in spread.items():
        if section and section.distributed != "none" and spec.endurance.on_bad_step == "skip":
            raise ValueError(
                f"{name}.distributed = {section.distributed!r} with endurance.on_bad_step = 'skip': the processes "
                "do not go back together; set endurance.on_bad_step = 'stop'"
            )
    if spec.through == "latent":
        _latent_agrees(spec)
    if spec.has_teacher:
        _teacher_agrees(spec)
    if spec.distils:
        _distill_agrees(spec)
    if spec.benches:
        _bench_agrees(spec)
    elif spec.bench.quality_rows and spec.through != "autoencoder":
        raise ValueError(
            f"bench.quality_rows = {spec.bench.quality_rows}, and no bench run is made; set bench.measure = true"
        )


def _latent_agrees(spec: PipelineSpec) -> None:
    latent, drawn = spec.latent, spec.continuations
    if spec.data.sequence_length < 2 * spec.data.chunk:
        raise ValueError(
            f"data.sequence_length = {spec.data.sequence_length} with data.chunk = {spec.data.chunk}: a row of one "
            "chunk has none before it that it could be predicted from"
        )
    if latent.sample_weight > 0 and 1.0 not in drawn.temperatures:
        raise ValueError(
            f"latent.sample_weight = {latent.sample_weight:g} is of continuations at T = 1, and "
            f"continuations.temperatures {list(drawn.temperatures)} do not hold it"
        )
    if latent.tempered_weight > 0 and all(one == 1.0 for one in drawn.temperatures):
        raise ValueError(
            f"latent.tempered_weight = {latent.tempered_weight:g} is of continuations below T = 1, and "
            f"continuations.temperatures {list(drawn.temperatures)} hold none"
        )
    if not latent.continues:
        return
    if spec.data.documents == "chat":
        name = "sample_weight" if latent.sample_weight > 0 else "tempered_weight"
        raise ValueError(
            f"latent.{name} = {getattr(latent, name):g} with data.documents = 'chat': a row holds answers without "
            "the prompts, and how a teacher goes on with a bare answer is not what it answered; set "
            f"latent.{name} = 0"
        )
    known = spec.data.train_sequences
    if drawn.rows is not None and known is not None and drawn.rows > known:
        raise ValueError(
            f"continuations.rows = {drawn.rows} is more than data.train_sequences = {known}; leave it out for all"
        )
    if drawn.rows is not None and latent.text_weight == 0 and latent.student.token_layers == 0:
        raise ValueError(
            f"continuations.rows = {drawn.rows} with latent.text_weight = 0 and no token head: the other rows "
            "would teach nothing"
        )
    used = latent.sample_continuations or drawn.count
    if used > drawn.count:
        raise ValueError(f"latent.sample_continuations = {used} is more than continuations.count = {drawn.count}")
    if latent.samples % used:
        raise ValueError(
            f"latent.samples = {latent.samples} cannot be shared out evenly among the {used} continuations of a "
            f"visit; set latent.samples = {used * max(1, latent.samples // used)}"
        )


def _bench_agrees(spec: PipelineSpec) -> None:
    bench = spec.bench
    if bench.prompt_tokens < spec.data.chunk:
        raise ValueError(f"bench.prompt_tokens = {bench.prompt_tokens} is less than a chunk of {spec.data.chunk}")
    if bench.transformers and not spec.distils:
        raise ValueError("bench.transformers = true, and no token-level student is trained; set latent.beside = true")
    bench.check_rows(spec.data.heldout_sequences, length=spec.data.sequence_length, chunk=spec.data.chunk)
    if spec.through != "latent":
        return
    if bench.method == "head" and bench.temperature != 1.0 and spec.latent.tempered_weight == 0.0:
        raise ValueError(
            f"bench.temperature = {bench.temperature:g} with bench.method = 'head': one draw of a student without "
            "latent.tempered_weight knows temperature 1 alone"
        )
    if bench.method == "head" and bench.temperature == 0.0:
        raise ValueError("bench.temperature = 0 with bench.method = 'head': a latent student votes for it")
    if bench.method == "tokens" and spec.latent.student.token_layers == 0:
        raise ValueError(
            "bench.method = 'tokens' with latent.student.token_layers = 0: there is no token head to write by"
        )


def _teacher_agrees(spec: PipelineSpec) -> None:
    backend = spec.teacher.backend
    if spec.teacher.model is None and backend in (*HTTP_BACKENDS, "store"):
        raise ValueError(f"teacher.backend = {backend!r} answers with token ids, and teacher.model names no tokenizer")
    if spec.teacher.model is None and spec.score.k > spec.data.vocab_size:
        raise ValueError(f"score.k = {spec.score.k} is larger than the vocabulary ({spec.data.vocab_size} tokens)")


def _distill_agrees(spec: PipelineSpec) -> None:
    if spec.data.chunk > 1 and spec.distill.cross_tokenizer:
        raise ValueError(
            f"data.chunk = {spec.data.chunk} with distill.cross_tokenizer: the padding of chunks is no text that "
            "another tokenizer could read"
        )
    if spec.data.chunk > 1 and spec.distill.on_policy > 0.0:
        raise ValueError(
            f"data.chunk = {spec.data.chunk} with distill.on_policy = {spec.distill.on_policy:g}: what the student "
            "writes is not cut into chunks"
        )
    if spec.distill.cross_tokenizer and spec.teacher.model is None:
        raise ValueError(
            "distill.cross_tokenizer = true, and teacher.model names no teacher: one that is trained here has the "
            "data's own tokenizer"
        )
    if spec.distill.cross_tokenizer and spec.distill.on_policy > 0.0 and spec.distill.targets == "store":
        raise ValueError("distill.on_policy with cross_tokenizer needs distill.targets = 'live'")
    if spec.score.mode == "sample" and spec.distill.targets == "store" and spec.distill.cross_tokenizer:
        raise ValueError(
            "score.mode = 'sample' with distill.cross_tokenizer: a drawn token that the student does not have "
            "cannot be carried over, and what is left would be biased"
        )
