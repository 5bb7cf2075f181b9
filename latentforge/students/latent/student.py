"""The latent student: a chunk of K tokens a step, its loss inside ``forward``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentforge.errors import RefusedError
from latentforge.kernels.linear import linear_kd_loss
from latentforge.kernels.targets import LinearTargets, Targets
from latentforge.students.causal import IGNORE
from latentforge.students.latent.backbone import Backbone, Decoder, DecoderShape, StateCache
from latentforge.students.latent.energy import EnergySettings, energy_score
from latentforge.students.latent.folder import WEIGHTS, read_description, read_weights, write_folder
from latentforge.students.latent.head import EnergyHead
from latentforge.students.latent.noise import TrainingNoise
from latentforge.students.latent.original import VectorLoss, VectorSignal, vector_loss
from latentforge.students.latent.token_head import TokenHead, TokenSteps

DESCRIPTION = "student.json"


@dataclass(frozen=True)
class LatentShape:
    """The size of a latent student: ``chunk`` K tokens a step, ``latent`` l numbers of the codec, ``noise`` u of the
    head; ``head_blocks`` of the energy head (CALM: a quarter of the layers), ``token_layers`` of the token head (0:
    there is none), ``tempered``: the energy head is told a temperature.
    """

    vocab_size: int
    chunk: int
    latent: int
    decoder: DecoderShape
    head_blocks: int
    noise: int = 64
    token_layers: int = 1
    tempered: bool = False

    def __post_init__(self) -> None:
        least = {"vocab_size": 1, "chunk": 1, "latent": 1, "head_blocks": 1, "noise": 1, "token_layers": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RefusedError(f"{name} = {getattr(self, name)} is less than {low}")


@dataclass(frozen=True)
class EnergySignal:
    """What the energy head is drawn towards: of row (b, i), predicted by state i, the chunk i + 1 of the text itself or
    R chunks with which a teacher continued the chunks up to i.

    ``mean`` and ``log_std`` [B, C-1, R, l] are the codec's posteriors of those chunks; ``given`` bool [B, C-1] says
    which rows there are (their values elsewhere do not count); ``temperature`` [B, C-1] is that of the text, in (0, 1],
    None for 1. ``denominator`` counts the given rows of the whole optimiser step.
    """

    mean: Tensor
    log_std: Tensor
    given: Tensor
    denominator: float
    weight: float = 1.0
    temperature: Tensor | None = None


@dataclass(frozen=True)
class TokenSignal:
    """What the token head is trained on: the text's tokens (``ce_weight``), a teacher's rows (``kd_weight``).

    ``targets`` are a teacher's B * (C * K - 1) rows, as of a row of C * K tokens: row t predicts token t + 1. Those of
    the first chunk, which no state precedes, and of padding are not used. ``denominator`` counts the tokens that are.
    """

    targets: Targets | LinearTargets | None
    denominator: float
    ce_weight: float
    kd_weight: float
    temperature: float = 1.0


@dataclass(frozen=True)
class StudentRecord:
    """What is known of a student beside its weights: the end of its texts, its tokenizer and its codec by sha256 (hex),
    and ``digest``, that of the weights' file."""

    eos_id: int
    tokenizer_sha256: str
    codec_sha256: str
    digest: str


class LatentLoss(NamedTuple):
    """``loss`` is differentiable and already divided by the step's denominators. Its detached parts are unweighted:
    ``energy`` by the name of the signal, ``token_ce`` and ``token_kd`` (NaN where nothing was asked). ``rows`` counts
    the rows of each energy signal, ``tokens`` those of the token head; ``vector`` are the parts of a vector signal.
    """

    loss: Tensor
    energy: dict[str, Tensor]
    token_ce: Tensor
    token_kd: Tensor
    rows: dict[str, int]
    tokens: int
    vector: VectorLoss | None = None


class LatentStudent(nn.Module):
    """Predicts the next chunk from the chunks before it, fed with their tokens and never with their latents.

    A chunk is int64 [K]; ``valid`` is false for padding, which is neither seen nor trained on. ``record`` is None until
    the student was saved or opened.
    """

    record: StudentRecord | None = None

    def __init__(self, shape: LatentShape, *, energy: EnergySettings | None = None) -> None:
        super().__init__()
        width = shape.decoder.width
        self.shape, self.energy = shape, energy or EnergySettings()
        self.table = nn.Embedding(shape.vocab_size, width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.backbone = Backbone(shape.decoder, shape.chunk)
        self.head = EnergyHead(
            width=width, latent=shape.latent, noise=shape.noise, blocks=shape.head_blocks, tempered=shape.tempered
        )
        self.token_head = TokenHead(shape.decoder, shape.token_layers) if shape.token_layers else None

    @classmethod
    def new(cls, shape: LatentShape, *, seed: int, energy: EnergySettings | None = None) -> LatentStudent:
        """A student with fresh fp32 weights that depend on ``seed`` and the shape alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(shape, energy=energy)

    def save(self, folder: Path, *, eos_id: int, tokenizer_sha256: str, codec_sha256: str) -> StudentRecord:
        """Write ``student.json`` and ``model.safetensors`` into a fresh ``folder``, whole or not at all.

        ``codec_sha256`` is the digest in the record of the codec that it was trained with.
        """
        known = {"eos_id": eos_id, "tokenizer_sha256": tokenizer_sha256, "codec_sha256": codec_sha256}
        content = {"shape": asdict(self.shape), "energy": asdict(self.energy), **known}
        self.record = StudentRecord(**known, digest=write_folder(folder, DESCRIPTION, self.state_dict(), content))
        return self.record

    @classmethod
    def open(
        cls, folder: Path, *, codec_sha256: str | None = None, tokenizer_sha256: str | None = None
    ) -> LatentStudent:
        """The student of a folder, fp32, in evaluation mode, its ``record`` set.

        RefusedError where the folder holds none, another schema or shape, weights that are not those written, or a
        student of another codec or tokenizer than is named (None: not compared).
        """
        content = read_description(folder / DESCRIPTION, what="latent student")
        try:
            shape = LatentShape(**{**content["shape"], "decoder": DecoderShape(**content["shape"]["decoder"])})
            energy = EnergySettings(**content["energy"])
            record = StudentRecord(**{field.name: content[field.name] for field in fields(StudentRecord)})
        except (KeyError, TypeError) as error:
            raise RefusedError(f"{folder / DESCRIPTION} describes no latent student: {error!r}") from None
        for what, wanted, found in (
            ("codec", codec_sha256, record.codec_sha256),
            ("tokenizer", tokenizer_sha256, record.tokenizer_sha256),
        ):
            if wanted is not None and wanted != found:
                raise RefusedError(
                    f"{folder}: a student of {what} {str(found)[:12]}…, {wanted[:12]}… was given",
                    next=f"give the {what} that it was trained with",
                )
        weights = read_weights(folder, DESCRIPTION, record.digest)
        student = cls.new(shape, seed=0, energy=energy)
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in student.state_dict().items()}:
            raise RefusedError(f"{folder / WEIGHTS} does not hold the tensors of {shape}")
        student.load_state_dict(weights)
        student.record = record
        return student.eval()

    def states(self, chunks: Tensor, valid: Tensor, cache: StateCache | None = None) -> Tensor:
        """States [B, C, d] of ``chunks`` int64 [B, C, K] with ``valid`` bool of that shape.

        State i has seen the chunks up to i and predicts chunk i + 1. With a ``cache``, these chunks follow the ones
        that it holds, and it is extended.
        """
        if chunks.dim() != 3 or chunks.shape[2] != self.shape.chunk or valid.shape != chunks.shape:
            raise RefusedError(
                f"chunks are {list(chunks.shape)} and valid {list(valid.shape)}, not [B, C, {self.shape.chunk}] both"
            )
        found: Tensor = self.backbone(self.table(chunks), valid, cache)
        return found

    def draw_latents(self, states: Tensor, noise: Tensor, temperature: Tensor | None = None) -> Tensor:
        """Latents fp32 [N, S, l] of the chunk after ``states`` [N, d], a draw for each ``noise`` [N, S, u].

        ``temperature`` [N] in (0, 1] is refused where the head is not tempered. ``noise.head_noise`` makes the noise.
        """
        found: Tensor = self.head(states, noise, temperature)
        return found

    def token_rows(self, states: Tensor, chunk: Tensor) -> Tensor:
        """Hidden states [N, K, d] that predict each token of ``chunk`` int64 [N, K] from the ones before it.

        ``states`` [N, d] are those before the chunk. Their logits are the product with ``table.weight``. Row k depends
        on the tokens before k alone: what is not known yet may be any id.
        """
        if self.token_head is None:
            raise _without_token_head()
        found: Tensor = self.token_head(states, self.table(chunk))
        return found

    def token_steps(self, states: Tensor) -> TokenSteps:
        """The rows of ``token_rows`` one after the other, as a chunk after ``states`` [N, d] is written."""
        if self.token_head is None:
            raise _without_token_head()
        return TokenSteps(self.token_head, self.table, states)

    def forward(
        self,
        chunks: Tensor,
        valid: Tensor,
        seeds: Tensor,
        *,
        energy: Mapping[str, EnergySignal],
        tokens: TokenSignal | None = None,
        vector: VectorSignal | None = None,
        kernel_backend: str = "auto",
    ) -> LatentLoss:
        """The loss of ``chunks`` int64 [B, C, K] under each signal; the first chunk of a row is not predicted.

        ``seeds`` int64 [B] make the noise: a row's loss does not depend on the batch around it. The energy score is
        computed in fp32, the token head's loss without logits of all rows.
        """
        if not energy and tokens is None and vector is None:
            raise RefusedError("there is no signal: nothing would be trained", next="give an energy or a token signal")
        if chunks.shape[1] < 2:
            raise RefusedError(f"chunks are {list(chunks.shape)}: at least two are needed to predict one")
        states = self.states(chunks[:, :-1], valid[:, :-1])
        noise = TrainingNoise(seeds, states.device)
        parts = {name: self._energy_part(states, signal, noise) for name, signal in sorted(energy.items())}
        loss = torch.zeros((), device=states.device)
        for name, part in parts.items():
            loss = loss + energy[name].weight * part
        token_ce = token_kd = torch.full((), torch.nan, device=states.device)
        labels = token_labels(chunks, valid)
        if tokens is not None:
            found = linear_kd_loss(
                self._token_states(states, chunks),
                self.table.weight,
                tokens.targets,
                labels,
                temperature=tokens.temperature,
                ce_weight=tokens.ce_weight,
                kd_weight=tokens.kd_weight,
                denominator=tokens.denominator,
                ignore_index=IGNORE,
                backend=kernel_backend,
            )
            loss, token_ce, token_kd = loss + found.loss, found.ce, found.kd
        as_vector = None
        if vector is not None:
            drawn = self._drawn_once(states, noise)
            as_vector = vector_loss(vector, drawn, labels, ignore_index=IGNORE, backend=kernel_backend)
            loss = loss + as_vector.loss
        return LatentLoss(
            loss,
            {name: part.detach() for name, part in parts.items()},
            token_ce,
            token_kd,
            {name: int(signal.given.sum()) for name, signal in energy.items()},
            int((labels != IGNORE).sum()) if tokens is not None else 0,
            as_vector,
        )

    def _energy_part(self, states: Tensor, signal: EnergySignal, noise: TrainingNoise) -> Tensor:
        """The summed energy score of the given rows over the denominator."""
        rows, continuations, latent = states.shape[1], signal.mean.shape[2], self.shape.latent
        each, left = divmod(self.energy.samples, continuations)
        if signal.mean.shape != (*states.shape[:2], continuations, latent) or signal.mean.shape != signal.log_std.shape:
            raise RefusedError(
                f"posteriors are {list(signal.mean.shape)} and {list(signal.log_std.shape)}, "
                f"not [{len(states)}, {rows}, R, {latent}]"
            )
        if left:
            raise RefusedError(
                f"samples = {self.energy.samples} cannot be shared out evenly among {continuations} chunks of a row",
                next=f"set samples = {continuations * max(1, each)}",
            )
        if signal.given.shape != states.shape[:2]:
            raise RefusedError(f"given is {list(signal.given.shape)}, not {list(states.shape[:2])}")
        if not signal.denominator > 0:
            raise RefusedError(f"denominator = {signal.denominator} is no number of rows of the optimiser step")
        chosen = signal.given
        counts = chosen.sum(1).tolist()
        uniform = noise.uniform(counts, self.energy.draws, self.shape.noise)
        with torch.no_grad():
            samples = noise.normal(counts, continuations, each, latent)
            samples.mul_(signal.log_std[chosen].float().exp().unsqueeze(2)).add_(signal.mean[chosen].unsqueeze(2))
        temperature = None if signal.temperature is None else signal.temperature[chosen]
        drawn = self.draw_latents(states[chosen], uniform, temperature)
        return energy_score(drawn, samples.flatten(1, 2), self.energy.alpha).sum() / signal.denominator

    def _drawn_once(self, states: Tensor, noise: TrainingNoise) -> Tensor:
        """A latent fp32 [B, C-1, l] after each of ``states``."""
        uniform = noise.uniform([states.shape[1]] * len(states), 1, self.shape.noise)
        return self.draw_latents(states.flatten(0, 1), uniform).reshape(*states.shape[:2], -1)

    def _token_states(self, states: Tensor, chunks: Tensor) -> Tensor:
        """The token head's hidden states [B * (L-1), d] of all L = C * K tokens of a row but its first.

        Those of the first chunk are zeros, which their labels leave out: so a teacher's rows are used where they lie.
        """
        rows, _, width = states.shape
        hidden = self.token_rows(states.flatten(0, 1), chunks[:, 1:].flatten(0, 1)).reshape(rows, -1, width)
        return F.pad(hidden, (0, 0, self.shape.chunk - 1, 0)).flatten(0, 1)

    def layers(self) -> list[nn.Module]:
        """The decoders' layers: what each pass that trains goes through, in their order."""
        return [layer for decoder in self.decoders() for layer in decoder.model.layers]

    def decoders(self) -> list[Decoder]:
        """Its stacks of layers: over chunks, and over tokens where there is a token head."""
        return [self.backbone.decoder] + ([] if self.token_head is None else [self.token_head.decoder])

    def checkpoint_activations(self) -> None:
        """From now on, keep no activations inside the layers while training: they are computed again for the gradient,
        with the same result.
        """
        for decoder in self.decoders():
            decoder.checkpoint_activations()
        self.head.checkpointing = True

    @property
    def checkpoints_activations(self) -> bool:
        """Whether every part of it does so, as the parts themselves hold it."""
        return self.head.checkpointing and all(one.checkpoints_activations for one in self.decoders())


def _without_token_head() -> RefusedError:
    return RefusedError(
        "this student has no token head: there are no probabilities of tokens", next="train with token_layers = 1"
    )


def predicted(valid: Tensor) -> Tensor:
    """The rows that the text itself gives an energy signal, bool [B, C-1] of ``valid`` bool [B, C, K]: those whose next
    chunk holds a token."""
    return valid[:, 1:].any(-1)


def token_labels(chunks: Tensor, valid: Tensor) -> Tensor:
    """What the token head is to predict, int64 [B * (C*K - 1)]: every token but a row's first, and ``IGNORE`` in its
    first chunk and for padding. ``chunks`` int64 and ``valid`` bool [B, C, K].
    """
    counted = valid.clone()
    counted[:, 0] = False
    return chunks.masked_fill(~counted, IGNORE).flatten(1)[:, 1:].flatten()
