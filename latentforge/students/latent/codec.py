"""The codec of the latent student: K tokens to one latent vector and back, each chunk by itself, without attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentforge.errors import RefusedError
from latentforge.kernels.decode import latent_decode
from latentforge.students.latent.folder import WEIGHTS, read_description, read_weights, write_folder

DESCRIPTION = "codec.json"


@dataclass(frozen=True)
class CodecShape:
    """The sizes of a codec: tokens of the vocabulary, tokens a chunk (K), numbers a latent (l), width of its layers and
    inner width of their SwiGLU.
    """

    vocab_size: int
    chunk: int
    latent: int
    width: int
    inner: int

    @property
    def encoding_flops(self) -> float:
        """Operations to encode one chunk, 2 a weight of a matrix product."""
        block = 3 * self.width * self.inner
        return 2.0 * (self.chunk * (block + self.width**2) + block + 2 * self.width * self.latent)

    @property
    def decoding_flops(self) -> float:
        """Operations to decode one latent to the likeliest tokens, the vocabulary's product included."""
        block = 3 * self.width * self.inner
        first = self.latent * self.width + block
        return 2.0 * (first + self.chunk * (self.width**2 + block + self.width * self.vocab_size))


class Posterior(NamedTuple):
    """The latents of N chunks as independent normals: mean and logarithm of the standard deviation, fp32 [N, l]."""

    mean: Tensor
    log_std: Tensor


@dataclass(frozen=True)
class CodecRecord:
    """What is known of a codec beside its weights.

    ``latent_std`` is the root of the mean variance of its held-out chunks' means: the unit in which noise on a latent
    is told. ``digest`` is the sha256 (hex) of the weights' file.
    """

    eos_id: int
    tokenizer_sha256: str
    latent_std: float
    digest: str


class Block(nn.Module):
    """h + SwiGLU(RMSNorm(h)) over the last dimension."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(states)).chunk(2, -1)
        out: Tensor = states + self.down(F.silu(gate) * up)
        return out


class Codec(nn.Module):
    """CALM's autoencoder (arXiv:2510.27688, section 3.1): encoder and decoder of single chunks, their embedding tied.

    The embedding has a row more than there are tokens: that of ``mask_id``, which the encoder sees where a place holds
    no token. It is never predicted. ``record`` is None until the codec was saved or opened.
    """

    record: CodecRecord | None = None

    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        for field in fields(shape):
            value = getattr(shape, field.name)
            if type(value) is not int or value < 1:
                raise RefusedError(f"a codec of {field.name} = {value!r}: each of its sizes is a whole number above 0")
        self.shape = shape
        width, inner, latent, chunk = shape.width, shape.inner, shape.latent, shape.chunk
        self.embedding = nn.Embedding(shape.vocab_size + 1, width)
        self.encoder_token = Block(width, inner)
        self.encoder_join = nn.Linear(chunk * width, width)
        self.encoder_chunk = Block(width, inner)
        self.encoder_norm = nn.RMSNorm(width, eps=1e-6)
        self.encoder_out = nn.Linear(width, 2 * latent)
        self.decoder_in = nn.Linear(latent, width)
        self.decoder_chunk = Block(width, inner)
        self.decoder_split = nn.Linear(width, chunk * width)
        self.decoder_token = Block(width, inner)
        self.decoder_norm = nn.RMSNorm(width, eps=1e-6)
        # By their inputs: with a small constant for all the first hundred steps teach nearly nothing.
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def mask_id(self) -> int:
        """The id that the encoder sees in place of a token that is not there."""
        return self.shape.vocab_size

    @property
    def output_weight(self) -> Tensor:
        """The last layer's weight [V, width]: the embedding without the mask's row."""
        return self.embedding.weight[: self.shape.vocab_size]

    def encode(self, tokens: Tensor, valid: Tensor) -> Posterior:
        """The posterior of chunks int64 [N, K]; what stands where ``valid`` bool [N, K] is False is not read."""
        if tokens.ndim != 2 or tokens.shape[1] != self.shape.chunk or valid.shape != tokens.shape:
            raise RefusedError(
                f"chunks {list(tokens.shape)} with valid {list(valid.shape)}: this codec reads [N, {self.shape.chunk}]"
            )
        seen = tokens.masked_fill(~valid, self.mask_id)
        states = self.encoder_token(self.embedding(seen)).flatten(1)
        states = self.encoder_norm(self.encoder_chunk(self.encoder_join(states)))
        mean, log_std = self.encoder_out(states).float().chunk(2, -1)
        return Posterior(mean, log_std)

    def hidden(self, latents: Tensor) -> Tensor:
        """The states [N, K, width] of latents [N, l] before the last layer."""
        if latents.ndim != 2 or latents.shape[1] != self.shape.latent:
            raise RefusedError(f"latents {list(latents.shape)}: this codec decodes [N, {self.shape.latent}]")
        states = self.decoder_chunk(self.decoder_in(latents))
        states = self.decoder_split(states).unflatten(-1, (self.shape.chunk, self.shape.width))
        out: Tensor = self.decoder_norm(self.decoder_token(states))
        return out

    def logits(self, latents: Tensor) -> Tensor:
        """Logits [N, K, V] of latents [N, l]: for a look at a few; nothing that trains or generates needs them."""
        return F.linear(self.hidden(latents), self.output_weight)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, backend: str = "auto") -> Tensor:
        """The likeliest tokens int64 [N, K] of latents [N, l]; nothing of the size [N·K, V] is made.

        A place whose logits are not finite is -1, as of :func:`latentforge.kernels.decode.latent_decode`.
        """
        states = self.hidden(latents).flatten(0, 1)
        found = latent_decode(
            states, self.embedding.weight.detach(), temperature=0.0, vocab=self.shape.vocab_size, backend=backend
        )
        return found.ids.unflatten(0, (len(latents), self.shape.chunk))

    def save(self, folder: Path, *, eos_id: int, tokenizer_sha256: str, latent_std: float) -> CodecRecord:
        """Write ``codec.json`` and ``model.safetensors`` into a fresh ``folder``, whole or not at all."""
        known = {"eos_id": eos_id, "tokenizer_sha256": tokenizer_sha256, "latent_std": latent_std}
        digest = write_folder(folder, DESCRIPTION, self.state_dict(), {"shape": asdict(self.shape), **known})
        record = CodecRecord(eos_id, tokenizer_sha256, latent_std, digest)
        self.record = record
        return record

    @classmethod
    def open(cls, folder: Path, *, tokenizer_sha256: str | None = None) -> Codec:
        """The codec of a folder, frozen and in evaluation mode, its ``record`` set.

        RefusedError where the folder holds none, another schema or shape, weights that are not those written, or a
        codec of another tokenizer than ``tokenizer_sha256`` (None: not compared).
        """
        shape, record = _described(folder / DESCRIPTION)
        if tokenizer_sha256 is not None and record.tokenizer_sha256 != tokenizer_sha256:
            raise RefusedError(
                f"{folder}: a codec of tokenizer {record.tokenizer_sha256[:12]}…, the data's is "
                f"{tokenizer_sha256[:12]}…",
                next="train a codec on this data:  through = 'autoencoder'",
            )
        weights = read_weights(folder, DESCRIPTION, record.digest)
        codec = cls(shape)
        wanted = {name: value.shape for name, value in codec.state_dict().items()}
        if {name: value.shape for name, value in weights.items()} != wanted:
            raise RefusedError(f"{folder / WEIGHTS} does not hold the tensors of {shape}")
        codec.load_state_dict(weights)
        codec.record = record
        return codec.requires_grad_(False).eval()


def new_codec(shape: CodecShape, *, seed: int) -> Codec:
    """A codec with fresh fp32 weights that depend on ``seed`` and the shape alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Codec(shape)


def _described(path: Path) -> tuple[CodecShape, CodecRecord]:
    content = read_description(path, what="codec", next="through = 'autoencoder'")
    try:
        shape = CodecShape(**content["shape"])
        return shape, CodecRecord(**{field.name: content[field.name] for field in fields(CodecRecord)})
    except (KeyError, TypeError) as error:
        raise RefusedError(f"{path} describes no codec: {error!r}") from None
