"""A token-level student: a transformers causal LM whose loss runs inside ``forward``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentforge.errors import FailedError, RefusedError
from latentforge.kernels.api import kd_loss
from latentforge.kernels.decode import latent_decode
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets
from latentforge.students.latent.chunks import chunked, valid
from latentforge.students.recomputing import layers_recomputed, recompute_layers

IGNORE = -100
# Settings with which an architecture changes its logits after the last layer; the loss here would not see that.
_RESCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


@dataclass(frozen=True)
class ModelShape:
    """The size of a new Qwen3 model; its vocabulary is the data's."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int


def shape_of(model: Any) -> ModelShape | None:
    """The size of a causal LM; None where its layers are not counted so (no SwiGLU, heads that are not the width)."""
    config = model.config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    found = [getattr(config, name, None) for name in names]
    if not all(type(one) is int for one in found):
        return None
    shape = ModelShape(*found)
    width = getattr(config, "head_dim", None) or shape.hidden // shape.heads
    gated = sum(name.endswith("gate_proj") for name, _ in model.named_modules())
    return shape if width * shape.heads == shape.hidden and gated == shape.layers else None


class LossParts(NamedTuple):
    """``loss`` is differentiable and already divided by the step's denominator; ``ce`` and ``kd`` are its detached
    parts, unweighted (``kd`` is NaN without targets); ``rows`` predictions went into them, of which ``ce_rows`` had a
    label and ``kd_rows`` targets in which the teacher says something (None: all that ``rows`` counts, and none where
    there were no targets)."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    rows: int
    ce_rows: int | None = None
    kd_rows: int | None = None


@dataclass(frozen=True)
class RowUse:
    """What the N rows of a batch are trained on where they differ: ``labelled`` and ``taught`` are bool [N].

    A labelled row's next token is the text's own, and counts in cross-entropy; a taught one has targets. Both has the
    weights of the objective, a taught row without a label KD alone, a labelled one without targets cross-entropy alone
    with the weight ``ce_alone``.
    """

    labelled: Tensor
    taught: Tensor
    ce_alone: float


@dataclass(frozen=True)
class Padding:
    """How rows are padded in which each document begins at a multiple of ``chunk`` tokens: what follows the first
    ``eos_id`` of a chunk is no text (see ``students.latent.chunks``)."""

    chunk: int
    eos_id: int


class Student(nn.Module):
    """A causal LM that is trained on every row of what it is given, but those whose next token is ``padding``.

    ``vocab_size`` counts real tokens: logits are computed for these alone, so padding rows of the embedding are never
    predicted. ``padding`` None says that there is none.
    """

    def __init__(self, model: Any, vocab_size: int, padding: Padding | None = None) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.padding = padding
        _refuse_rescaled_logits(model)
        rows = int(model.get_output_embeddings().weight.shape[0])
        if rows < vocab_size:
            raise RefusedError(
                f"the student answers for {rows} ids, the data has {vocab_size} tokens",
                next="start from a folder whose tokenizer is the data's, or leave distill.student.init out",
            )

    def forward(
        self,
        tokens: Tensor,
        targets: Targets | None,
        denominator: float,
        *,
        temperature: float,
        ce_weight: float,
        kd_weight: float,
        kernel_backend: str = "auto",
        use: RowUse | None = None,
    ) -> LossParts:
        """The loss of ``tokens`` int64 [B, L] against ``targets`` of N = B·(L-1) rows (None only with kd_weight = 0).

        With ``use`` rows differ in what they are trained on, and ``targets`` are of the taught rows alone, in their
        order. ``denominator`` counts the valid predictions of the whole optimiser step. Refused where the targets are
        not of exactly these rows: a part of a batch is never trained in silence. Rows of padding have targets too, of
        which nothing is trained.
        """
        labels = self.labels(tokens)
        settings = {"temperature": temperature, "denominator": denominator, "backend": kernel_backend}
        if use is not None:
            return self._by_use(tokens, labels, targets, use, ce_weight, kd_weight, settings)
        loss, ce, kd = kd_loss(
            self.logits(tokens),
            targets,
            labels,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            ignore_index=IGNORE,
            **settings,
        )
        counted = labels != IGNORE
        rows = int(counted.sum())
        return LossParts(loss, ce, kd, rows, rows, 0 if targets is None else int((counted & told(targets)).sum()))

    def _by_use(
        self,
        tokens: Tensor,
        labels: Tensor,
        targets: Targets | None,
        use: RowUse,
        ce_weight: float,
        kd_weight: float,
        settings: dict[str, Any],
    ) -> LossParts:
        """One pass through the layers, then a head and a loss for the rows of each use."""
        counted = labels != IGNORE
        if bool((~use.labelled & ~use.taught & counted).any()):
            raise RefusedError("a row has neither label nor targets: nothing of it would be trained")
        taught, given = int(use.taught.sum()), 0 if targets is None else target_count(targets)
        if given != taught:
            raise RefusedError(f"targets of {given} rows were given for {taught} taught rows")
        # Row n of the batch is row place[n] of the targets, which are of the taught rows alone.
        place = use.taught.long().cumsum(0) - 1
        states = self.hidden(tokens[:, :-1])
        uses = (
            (True, use.labelled & use.taught, ce_weight, kd_weight),
            (True, use.labelled & ~use.taught, use.ce_alone, 0.0),
            (False, ~use.labelled & use.taught, 0.0, kd_weight),
        )
        zero = torch.zeros((), dtype=torch.float32, device=tokens.device)
        loss, ce, kd, rows, ce_rows, kd_rows = zero, zero, zero, 0, 0, 0
        for labelled, chosen, ce_share, kd_share in uses:
            index = chosen.nonzero().squeeze(-1)
            if not len(index):
                continue
            part = kd_loss(
                self.head(states[index]),
                target_rows(targets, place[index]) if kd_share > 0 and targets is not None else None,
                labels[index],
                ce_weight=ce_share,
                kd_weight=kd_share,
                ignore_index=IGNORE,
                **settings,
            )
            valid = int(counted[index].sum())
            loss, rows = loss + part.loss, rows + valid
            if labelled:
                ce, ce_rows = ce + part.ce, ce_rows + valid
            if kd_share > 0 and targets is not None:
                kd, kd_rows = kd + part.kd, kd_rows + int((counted[index] & told(targets)[place[index]]).sum())
        return LossParts(loss, ce, kd if kd_rows else torch.full_like(kd, torch.nan), rows, ce_rows, kd_rows)

    def labels(self, tokens: Tensor) -> Tensor:
        """What the rows of ``tokens`` int64 [B, L] predict, int64 [B·(L-1)]: ``IGNORE`` where that is padding."""
        if self.padding is None:
            return tokens[:, 1:].reshape(-1)
        text = valid(chunked(tokens, self.padding.chunk), self.padding.eos_id).flatten(1)
        return tokens.masked_fill(~text, IGNORE)[:, 1:].reshape(-1)

    def logits(self, tokens: Tensor) -> Tensor:
        """Fresh logits [B·(L-1), vocab_size], row-major: row (b, i) predicts token i + 1 of ``tokens`` [B, L]."""
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise RefusedError(f"tokens have shape {list(tokens.shape)}; [B, L] with L of at least 2 is needed")
        return self.head(self.hidden(tokens[:, :-1]))

    def hidden(self, inputs: Tensor) -> Tensor:
        """Hidden states [B·L, H] after the last norm, for ``inputs`` int64 [B, L]."""
        states: Tensor = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        return states.reshape(-1, states.shape[-1])

    def head(self, states: Tensor) -> Tensor:
        """Logits [N, vocab_size] of hidden states [N, H]: a tensor of its own, over which the kernel may write."""
        head = self.model.get_output_embeddings()
        bias = None if head.bias is None else head.bias[: self.vocab_size]
        # The weight is cut, not the logits: a view of logits is refused by the kernel, and padding costs no work.
        return F.linear(states, head.weight[: self.vocab_size], bias)

    def checkpoint_activations(self) -> None:
        """From now on, keep no activations inside the layers while training: they are computed again for the gradient,
        with the same result. RefusedError for an architecture whose layers cannot.
        """
        recompute_layers(self.model)

    @property
    def checkpoints_activations(self) -> bool:
        """Whether every layer does so, as the layers themselves hold it."""
        return layers_recomputed(self.model)

    @torch.no_grad()
    def continue_greedily(self, inputs: Tensor, new_tokens: int) -> Tensor:
        """``inputs`` int64 [B, L] followed by the ``new_tokens`` most likely ones."""
        for _ in range(new_tokens):
            states: Tensor = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
            inputs = torch.cat([inputs, self.head(states[:, -1].contiguous()).argmax(-1, keepdim=True)], dim=1)
        return inputs

    @torch.no_grad()
    def sample(
        self, inputs: Tensor, new_tokens: int, *, temperature: float, seeds: Tensor, backend: str = "auto"
    ) -> Tensor:
        """``inputs`` int64 [B, L] followed by ``new_tokens`` drawn at ``temperature``; the same for the same weights
        and ``seeds`` int64 [B], whatever else was drawn in this process.
        """
        head = self.model.get_output_embeddings()
        text, given, cache = inputs, inputs, None
        for _ in range(new_tokens):
            found = self.model.base_model(input_ids=given, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            positions = torch.full_like(seeds, text.shape[1])
            drawn = latent_decode(
                found.last_hidden_state[:, -1].contiguous(),
                head.weight,
                temperature=temperature,
                seeds=seeds,
                positions=positions,
                bias=head.bias,
                vocab=self.vocab_size,
                backend=backend,
            ).ids
            if bool((drawn < 0).any()):
                raise FailedError("the student's logits are not finite: nothing can be drawn from it")
            given = drawn.unsqueeze(1)
            text = torch.cat([text, given], dim=1)
        return text


def target_rows(targets: Targets, index: Tensor) -> Targets:
    """The rows ``index`` int64 [n] of some targets, in that order."""
    if len(index) == target_count(targets) and bool((index == torch.arange(len(index), device=index.device)).all()):
        return targets
    if isinstance(targets, DenseTargets):
        return DenseTargets(targets.logits[index])
    return TopKTargets(targets.ids[index], targets.logprobs[index], targets.tail[index])


def target_count(targets: Targets) -> int:
    """The rows that some targets are of."""
    return len(targets.logits if isinstance(targets, DenseTargets) else targets.ids)


def told(targets: Targets) -> Tensor:
    """The rows, bool [N], in which the teacher says something: not those whose every entry is absent."""
    if isinstance(targets, DenseTargets):
        return torch.ones(len(targets.logits), dtype=torch.bool, device=targets.logits.device)
    return targets.ids[:, 0] >= 0


def new_model(shape: ModelShape, *, vocab_size: int, positions: int, eos_id: int, seed: int, tied: bool = True) -> Any:
    """A Qwen3 causal LM with fresh fp32 weights that depend on ``seed`` and the shape alone; ``tied`` to its embedding
    or with a head of its own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep a model's weights as ``dtype``, and its buffers as they are.

    ``model.to(dtype)`` would round the frequencies of the positions too, which transformers keeps in fp32: what was
    trained would not be what is opened.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def model_from_folder(folder: Path) -> Any:
    """The fp32 causal LM of a Hugging Face folder, from disk alone; refused where a tensor is missing."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RefusedError(f"transformers cannot load student {folder}: {first}") from error
    model, report = loaded
    wrong = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in report.get(kind, ()))
    if wrong:
        raise RefusedError(f"student {folder} lacks {len(wrong)} tensor(s): {', '.join(wrong[:3])}")
    return model


def _refuse_rescaled_logits(model: Any) -> None:
    for name in _RESCALED:
        value = getattr(model.config, name, None)
        if value not in (None, 0, 1, 1.0):
            raise RefusedError(
                f"the student's {name} = {value} changes its logits after the last layer, which the loss does not do",
                next="start from another architecture",
            )
