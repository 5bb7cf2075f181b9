"""What a model costs, for a comparison at equal cost: operations a token, its sampler included, and in training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from latentforge.errors import RefusedError
from latentforge.students.causal import ModelShape, shape_of
from latentforge.students.latent.flops import latent_inference, token_inference
from latentforge.students.latent.matching import TOLERANCE, Matched, matched_shape
from latentforge.students.latent.session import LatentModel
from latentforge.students.token_session import TokenModel
from latentforge.writers.opening import Writer


@dataclass(frozen=True)
class Cost:
    """Operations for a token at inference, reading a whole row of the data, with ``draws`` of the head a chunk; in
    training, those that the model's own run counted (its teacher's and its codec's are not among them). None where a
    shape is not counted, a latent student wrote token by token, or there is no run's folder around the model."""

    inference: float | None
    training: float | None
    draws: float

    def as_json(self) -> dict[str, float | None]:
        """The cost as data."""
        return {
            "inference_flops_per_token": self.inference,
            "training_flops": self.training,
            "draws_per_chunk": self.draws,
        }


@dataclass(frozen=True)
class Equal:
    """Two costs at inference: by what share the token-level student's is above the latent one's, None where none is
    beside it; and the ``matched`` size of one that costs as much, None where there is none."""

    difference: float | None
    matched: Matched | None

    @property
    def holds(self) -> bool | None:
        """Whether the two are called equal."""
        return None if self.difference is None else abs(self.difference) <= TOLERANCE

    def as_json(self) -> dict[str, Any]:
        """The comparison as data."""
        found = None
        if self.matched is not None:
            found = {"shape": asdict(self.matched.shape), "difference": self.matched.difference}
        return {"difference": self.difference, "within": TOLERANCE, "equal": self.holds, "matched": found}


def cost_of(writer: Writer, *, positions: int, draws: float) -> Cost:
    """The cost of a model that reads ``positions`` tokens and makes ``draws`` draws of each chunk, 0 where a latent one
    draws its tokens one by one."""
    model, inference = writer.model, None
    if isinstance(model, LatentModel):
        if draws > 0:
            chunks = -(-positions // model.chunk)
            inference = latent_inference(model.student.shape, model.codec.shape, positions=chunks, draws=draws).total
    elif isinstance(model, TokenModel):
        shape = shape_of(model.student.model)
        if shape is not None:
            inference = token_inference(shape, vocab_size=model.vocab_size, positions=positions).total
    return Cost(inference, _training(writer), draws)


def compared(
    latent: Writer, cost: Cost, other: Writer | None, other_cost: Cost | None, *, positions: int
) -> Equal | None:
    """How the costs of a latent student and of a token-level one beside it compare, and which size would cost the same:
    most like the one beside, or where there is none, like the latent student's own layers. None where one is not
    counted."""
    assert isinstance(latent.model, LatentModel)
    if cost.inference is None:
        return None
    decoder = latent.model.student.shape.decoder
    like = ModelShape(decoder.layers, decoder.width, decoder.heads, decoder.kv_heads, decoder.intermediate)
    difference = None
    if other is not None and other_cost is not None:
        assert isinstance(other.model, TokenModel)
        if other_cost.inference is None:
            return None
        like = shape_of(other.model.student.model) or like
        difference = other_cost.inference / cost.inference - 1
    try:
        matched = matched_shape(cost.inference, like=like, vocab_size=latent.model.vocab_size, positions=positions)
    except RefusedError:
        matched = None
    return Equal(difference, matched)


def _training(writer: Writer) -> float | None:
    """What the run of this folder says that its training took."""
    effective = writer.folder.parent.parent / "effective.json"
    if writer.folder.parent.name != "out" or not effective.is_file():
        return None
    try:
        flops = json.loads(effective.read_bytes()).get("flops", {})
        found = next((flops[name] for name in ("latent", "student", "teacher") if name in flops), None)
    except (ValueError, AttributeError) as error:
        raise RefusedError(f"{effective} cannot be read: {error!r}", next="collect the run again") from None
    return None if found is None else float(found)
