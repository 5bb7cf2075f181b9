"""What a token of text costs: multiplications and additions of a student's matrix products, its sampler included.

Per token, not per step: a latent student's backbone and head run once for K tokens. A draw runs the head *and* the
codec with its product with the vocabulary, so a sampler that makes 200 draws of a chunk pays for both 200 times.
Element-wise work is left out (it is small and does not grow with a width squared). CALM's figures (arXiv 2510.27688)
come out within 4 % for inference and 12 % for training.
"""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.errors import RefusedError
from latentforge.students.causal import ModelShape
from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.codec import CodecShape
from latentforge.students.latent.student import LatentShape


@dataclass(frozen=True)
class TokenCost:
    """Floating-point operations for one token, by part.

    ``layers`` the decoder's matrices, ``attention`` of its positions, ``input`` the compression of a chunk, ``head``
    the energy head and ``codec`` its decoding, times the draws (in training: the encoding of targets, and the decoding
    of latents that are held to tokens), ``vocabulary`` the last product of a token-level student, ``token_head`` that
    of a latent one, in training.
    """

    layers: float
    attention: float
    input: float = 0.0
    head: float = 0.0
    codec: float = 0.0
    vocabulary: float = 0.0
    token_head: float = 0.0

    @property
    def total(self) -> float:
        """All parts together."""
        return float(sum(vars(self).values()))


def token_inference(shape: ModelShape, *, vocab_size: int, positions: int) -> TokenCost:
    """One token of a token-level student that attends to ``positions`` positions."""
    decoder = DecoderShape(shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.intermediate)
    return TokenCost(_layers(decoder), _attention(decoder, positions), vocabulary=2.0 * shape.hidden * vocab_size)


def token_training(shape: ModelShape, *, vocab_size: int, positions: int) -> TokenCost:
    """The same in training: a gradient costs twice what the forward pass does."""
    return _times(3, token_inference(shape, vocab_size=vocab_size, positions=positions))


def latent_inference(shape: LatentShape, codec: CodecShape, *, positions: int, draws: float = 1.0) -> TokenCost:
    """One token of a latent student that attends to ``positions`` chunks and makes ``draws`` draws of each chunk.

    ``draws`` is what the sampler really makes, on average: the N of a vote, the mean of ``Drawn.made`` of a rejection,
    1 at T = 1 or with a tempered head.
    """
    _check(shape, codec)
    if not draws >= 1:
        raise RefusedError(f"draws = {draws}: a chunk takes at least one")
    return TokenCost(
        _layers(shape.decoder) / shape.chunk,
        _attention(shape.decoder, positions) / shape.chunk,
        input=_input(shape) / shape.chunk,
        head=(_head_context(shape) + draws * _head_draw(shape)) / shape.chunk,
        codec=draws * codec.decoding_flops / shape.chunk,
    )


def latent_training(
    shape: LatentShape,
    codec: CodecShape,
    *,
    positions: int,
    draws: float,
    encoded: float = 1.0,
    decoded: float = 0.0,
    token_head: bool,
) -> TokenCost:
    """One token of a latent student in training, a chunk of it being drawn ``draws`` times by the head, on average: N
    for each energy signal, once for those of the first LatentForge together.

    The state's way into the head is counted for each draw, as in CALM's figures, and walked once for the N of a signal.
    ``encoded`` chunks are encoded for each chunk trained on, without a gradient: 1 for plain text, R more for R stored
    continuations. ``decoded`` drawn latents are held to tokens through the frozen codec. ``token_head`` says whether it
    is trained too.
    """
    _check(shape, codec)
    return TokenCost(
        3 * _layers(shape.decoder) / shape.chunk,
        3 * _attention(shape.decoder, positions) / shape.chunk,
        input=3 * _input(shape) / shape.chunk,
        head=3 * draws * (_head_context(shape) + _head_draw(shape)) / shape.chunk,
        codec=(encoded * codec.encoding_flops + 2 * decoded * codec.decoding_flops) / shape.chunk,
        token_head=3 * _token_head(shape) / shape.chunk if token_head else 0.0,
    )


def _layers(decoder: DecoderShape) -> float:
    """Of one position: queries, keys, values, output and the three matrices of SwiGLU."""
    width, shared = decoder.width, decoder.width * decoder.kv_heads // decoder.heads
    return 2.0 * decoder.layers * (2 * width * width + 2 * width * shared + 3 * width * decoder.intermediate)


def _attention(decoder: DecoderShape, positions: int) -> float:
    """Of one position: products with the keys and the values of ``positions``."""
    return 4.0 * positions * decoder.width * decoder.layers


def _input(shape: LatentShape) -> float:
    """Of one chunk: K d -> 2d -> d."""
    width = shape.decoder.width
    return 2.0 * (2 * shape.chunk * width * width + 2 * width * width)


def _head_context(shape: LatentShape) -> float:
    """Of one chunk, whatever its draws: the state to d."""
    return 2.0 * shape.decoder.width**2


def _head_draw(shape: LatentShape) -> float:
    """Of one draw: noise to d, the blocks, d to d to the latent."""
    width = shape.decoder.width
    return 2.0 * (6 * width * width * shape.head_blocks + width * width + (shape.noise + shape.latent) * width)


def _token_head(shape: LatentShape) -> float:
    """Of one chunk: the state's way in, K positions of its layers, K products with the vocabulary."""
    decoder = DecoderShape(
        shape.token_layers,
        shape.decoder.width,
        shape.decoder.heads,
        shape.decoder.kv_heads,
        shape.decoder.intermediate,
    )
    each = _layers(decoder) + _attention(decoder, shape.chunk) + 2.0 * decoder.width * shape.vocab_size
    return 2.0 * decoder.width**2 + shape.chunk * each


def _times(factor: float, cost: TokenCost) -> TokenCost:
    return TokenCost(**{name: factor * value for name, value in vars(cost).items()})


def _check(shape: LatentShape, codec: CodecShape) -> None:
    for name in ("vocab_size", "chunk", "latent"):
        if getattr(shape, name) != getattr(codec, name):
            raise RefusedError(
                f"{name} is {getattr(shape, name)} of the student and {getattr(codec, name)} of the codec"
            )
