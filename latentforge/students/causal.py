"""A token-level student: a transformers causal LM whose loss runs inside ``forward``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentforge.errors import RefusedError
from latentforge.kernels.api import kd_loss
from latentforge.kernels.targets import Targets

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


class LossParts(NamedTuple):
    """``loss`` is differentiable and already divided by the step's denominator; ``ce`` and ``kd`` are its detached
    parts, unweighted (``kd`` is NaN without targets); ``rows`` predictions went into them."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    rows: int


class Student(nn.Module):
    """A causal LM that is trained on every row of what it is given.

    ``vocab_size`` counts real tokens: logits are computed for these alone, so padding rows of the embedding are never
    predicted.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
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
    ) -> LossParts:
        """The loss of ``tokens`` int64 [B, L] against ``targets`` of N = B·(L-1) rows (None only with kd_weight = 0).

        ``denominator`` counts the valid predictions of the whole optimiser step. Refused where the targets are not of
        exactly these rows: a part of a batch is never trained in silence.
        """
        labels = tokens[:, 1:].reshape(-1)
        loss, ce, kd = kd_loss(
            self.logits(tokens),
            targets,
            labels,
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            denominator=denominator,
            ignore_index=IGNORE,
            backend=kernel_backend,
        )
        return LossParts(loss, ce, kd, int((labels != IGNORE).sum()))

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

    @torch.no_grad()
    def continue_greedily(self, inputs: Tensor, new_tokens: int) -> Tensor:
        """``inputs`` int64 [B, L] followed by the ``new_tokens`` most likely ones."""
        for _ in range(new_tokens):
            states: Tensor = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
            inputs = torch.cat([inputs, self.head(states[:, -1].contiguous()).argmax(-1, keepdim=True)], dim=1)
        return inputs


def new_model(shape: ModelShape, *, vocab_size: int, positions: int, eos_id: int, seed: int) -> Any:
    """A Qwen3 causal LM with fresh fp32 weights that depend on ``seed`` and the shape alone."""
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
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


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
