"""Distil one transformers model into another, twice: through logits, and without ever having them.

Run it as it is: both models are made on the spot, so nothing is downloaded. For models of your own, put them in the
place of ``make_model``; teacher and student need the same tokenizer. The one line that differs from any other training
loop is the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from latentforge.kernels import DenseTargets, KDLoss, LinearTargets, kd_loss, linear_kd_loss

VOCABULARY, LENGTH, ROWS = 512, 32, 8
IGNORED = -100


def make_model(width: int, seed: int) -> PreTrainedModel:
    """A small Qwen3 with weights drawn from ``seed``."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    # A fresh head is nearly indifferent; a teacher has opinions.
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the last layer sees of ``tokens`` [B, L + 1] at the L positions that predict one: [B * L, width]."""
    return model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)


def loss_through_logits(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, labels: Tensor) -> KDLoss:
    """Student and teacher logits [N, V] are made; the gradient takes the place of the student's."""
    with torch.no_grad():
        targets = DenseTargets(teacher.lm_head(hidden_states(teacher, tokens)))
    logits = student.lm_head(hidden_states(student, tokens))
    return kd_loss(logits, targets, labels, **settings(labels))


def loss_without_logits(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, labels: Tensor) -> KDLoss:
    """Neither is made: the loss takes what goes into both last layers."""
    with torch.no_grad():
        targets = LinearTargets(hidden_states(teacher, tokens), teacher.lm_head.weight)
    return linear_kd_loss(hidden_states(student, tokens), student.lm_head.weight, targets, labels, **settings(labels))


def settings(labels: Tensor) -> dict[str, float]:
    """0.1 of cross-entropy and 0.9 of KL at T = 2, per token that counts in the whole optimiser step."""
    return {
        "temperature": 2.0,
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "denominator": float((labels != IGNORED).sum()),
    }


def distil(*, with_logits: bool, steps: int = 40) -> list[float]:
    """The KD part of the loss before each step."""
    teacher, student = make_model(64, seed=0).eval(), make_model(32, seed=1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    labels = tokens[:, 1:].flatten().clone()
    labels[::LENGTH] = IGNORED  # as if the first token of each row belonged to a prompt
    loss_of = loss_through_logits if with_logits else loss_without_logits
    seen = []
    for _ in range(steps):
        loss, _, kd = loss_of(student, teacher, tokens, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(kd.item())
    return seen


if __name__ == "__main__":
    for with_logits in (True, False):
        losses = distil(with_logits=with_logits)
        name = "kd_loss       " if with_logits else "linear_kd_loss"
        print(f"{name}  kd {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
