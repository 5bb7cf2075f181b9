"""That the loss compares each prediction with the teacher's row of that very position, through everything between."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentforge.contracts.finding import Finding
from latentforge.students.causal import Student
from latentforge.targets.row import SequenceTargets
from latentforge.targets.store import TargetStore
from latentforge.teachers.store import StoreTeacher

_SEQUENCES, _LENGTH, _VOCABULARY, _K = 3, 13, 61, 4
_SHIFTS = (-2, -1, 0, 1, 2)
_PEAK = 0.97
_STEPS = 60


def loss_is_least_at_its_position(*, shift: int = 0) -> Finding:
    """A teacher with one unique token a position: the KD loss has its minimum exactly there, and training finds it.

    The rows go the whole way: into a store on disk, back by the tokens, through the student's own forward pass and the
    kernel. Asked is (1) that among students which name the unique token of ``position + s`` the loss is least at
    s = 0; (2) that gradient descent on the loss alone makes every position name its own unique token. ``shift`` plants
    stored rows off by some positions.
    """
    order = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, _VOCABULARY, (_SEQUENCES, _LENGTH), generator=order)
    positions = _SEQUENCES * (_LENGTH - 1)
    unique = torch.randperm(_VOCABULARY, generator=order)[:positions]
    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as name:
        targets = _through_a_store(Path(name), tokens, unique.reshape(_SEQUENCES, -1), shift)
    losses = {s: _loss(_student(unique.roll(-s)), tokens, targets) for s in _SHIFTS}
    best = min(losses, key=lambda s: losses[s])
    taught = _taught(tokens, targets)
    right = int((taught == unique).sum())
    rest = min(value for s, value in losses.items() if s != best)
    text = (
        f"least loss at shift {best:+d} ({losses[best]:.3g} nats a position, next {rest:.3g}); after {_STEPS} steps "
        f"{right} of {positions} positions name their own token"
    )
    passed = best == 0 and right == positions and losses[0] < 1e-3 < rest
    return Finding(passed, text, {"losses": {str(s): v for s, v in losses.items()}, "right": right})


def _through_a_store(folder: Path, tokens: Tensor, unique: Tensor, shift: int) -> Any:
    """Targets as a training step gets them: written by sequence, read back by the batch's tokens in another order."""
    rows = []
    for own in unique.numpy():
        others = np.stack([[i for i in range(_VOCABULARY) if i != one][: _K - 1] for one in own])
        ids = np.concatenate([own[:, None], others], axis=1).astype(np.int32)
        small = (1 - _PEAK) / (_VOCABULARY - 1)
        logprobs = np.log(np.broadcast_to([_PEAK, *[small] * (_K - 1)], ids.shape)).astype(np.float32)
        tail = np.full(len(own), np.log(1 - _PEAK - (_K - 1) * small), dtype=np.float32)
        rows.append(SequenceTargets(np.roll(ids, shift, axis=0), logprobs, {1.0: tail}))
    identity = {"model": "unique", "sha256": "0" * 64, "quantization": "float32", "tokenizer_sha256": "none"}
    path = folder / "targets.sqlite"
    with TargetStore.create(path, identity, _K, (1.0,), vocab_size=_VOCABULARY) as store:
        store.put_many(reversed(list(zip(tokens.numpy(), rows, strict=True))))
    with StoreTeacher.open(path) as teacher:
        return teacher.targets(tokens, temperature=1.0)


class _Positional(nn.Module):
    """A base model that knows nothing but where it is: hidden state (b, i) is the unit vector of b·(L-1) + i."""

    def __init__(self) -> None:
        super().__init__()
        self.config = None

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        rows, length = input_ids.shape
        states = torch.eye(rows * length).reshape(rows, length, -1)
        return type("Output", (), {"last_hidden_state": states})


class _Model(nn.Module):
    """What :class:`Student` needs of a transformers model, with the positional base and a free head."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.base_model, self.config = _Positional(), None
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head.weight = nn.Parameter(weight)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def _student(named: Tensor) -> Student:
    """A student whose row n says about token ``named[n]`` what the teacher says about its own."""
    weight = torch.full((_VOCABULARY, len(named)), 0.0)
    weight[named, torch.arange(len(named))] = float(np.log(_PEAK / ((1 - _PEAK) / (_VOCABULARY - 1))))
    return Student(_Model(weight), _VOCABULARY)


def _loss(student: Student, tokens: Tensor, targets: Any) -> float:
    positions = tokens.shape[0] * (tokens.shape[1] - 1)
    wanted: Any = {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0, "kernel_backend": "reference"}
    return float(student(tokens, targets, positions, **wanted).loss.detach())


def _taught(tokens: Tensor, targets: Any) -> Tensor:
    """The token that each position names after steps of the KD loss alone, from a head that says nothing."""
    positions = tokens.shape[0] * (tokens.shape[1] - 1)
    model = _Model(torch.zeros(_VOCABULARY, positions))
    student = Student(model, _VOCABULARY)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        wanted: Any = {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0, "kernel_backend": "reference"}
        student(tokens, targets, positions, **wanted).loss.backward()
        optimiser.step()
    return model.head.weight.detach().argmax(dim=0)
