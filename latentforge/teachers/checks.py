"""Checks that contracts name: vocabularies, teachers, their store, and the teacher that is its own student."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentforge.contracts import Finding, worse
from latentforge.errors import RefusedError

_VOCABULARY = 264
_LENGTH = 24


def vocabulary_identity(*, comparison: str = "tokens") -> Finding:
    """Two vocabularies of one size, one pair of tokens swapped: refused with the index; an equal copy is accepted.

    ``comparison="size"`` plants the rule that is not enough.
    """
    from latentforge.data.tokenizer import vocabulary
    from latentforge.teachers.alignment import compare_vocabularies

    with _folder() as folder:
        teacher, copy, swapped = folder / "teacher", folder / "copy", folder / "swapped"
        _tiny_tokenizer(teacher)
        shutil.copytree(teacher, copy)
        shutil.copytree(teacher, swapped)
        low, high = 100, 200
        _swap_tokens(swapped / "tokenizer.json", low, high)

        def refusal(student: Path) -> str | None:
            try:
                if comparison == "tokens":
                    compare_vocabularies(teacher, student)
                elif len(vocabulary(teacher)) != len(vocabulary(student)):
                    return "sizes differ"
            except RefusedError as error:
                return str(error)
            return None

        accepted, refused = refusal(copy), refusal(swapped)
    if accepted is not None:
        return Finding(False, f"an equal vocabulary was refused: {accepted}")
    named = refused is not None and f"at id {low}:" in refused
    text = f"swap of ids {low} and {high} refused at id {low}" if named else f"swap of ids {low} and {high}: {refused}"
    return Finding(named, text, {"size": _VOCABULARY, "swapped": [low, high], "refusal": refused})


def fixture_repeats_last_token(*, shift: int = 0) -> Finding:
    """The fixture's most likely token at row (b, i) is token i, dense and top-k. ``shift`` plants rows off by some."""
    import torch

    from latentforge.kernels.targets import DenseTargets, TopKTargets
    from latentforge.teachers.fixture import FixtureTeacher

    tokens = _tokens(_VOCABULARY)
    expected = tokens[:, :-1].reshape(-1)
    teacher = FixtureTeacher(_VOCABULARY)
    dense, top = teacher.targets(tokens, temperature=1.0), teacher.targets(tokens, temperature=1.0, k=4)
    if not isinstance(dense, DenseTargets) or not isinstance(top, TopKTargets):
        return Finding(False, f"the fixture answered with {type(dense).__name__} and {type(top).__name__}")
    answers = torch.stack([dense.logits.argmax(-1), top.ids[:, 0].long()]).roll(shift, dims=1)
    right = int((answers == expected).all(dim=0).sum())
    text = f"argmax is the last token at {right} of {len(expected)} positions"
    return Finding(right == len(expected), text, {"right": right, "positions": len(expected)})


def hf_equals_transformers(*, mutant: str | None = None) -> Finding:
    """The hf backend gives transformers' own log-probabilities at every position, padding rows masked.

    Mutants: ``shifted`` (rows off by one), ``padding`` (padding rows left in the softmax).
    """
    import torch

    from latentforge.teachers.hf import HFTeacher

    with _folder() as folder:
        model = _tiny_model(folder, seed=1, rows=_VOCABULARY + 24)
        tokens = _tokens(_VOCABULARY)
        teacher = HFTeacher.open(folder)
        logits = teacher.logits(tokens)
        if mutant == "padding":
            logits[:, _VOCABULARY:] = 0.0
        if mutant == "shifted":
            logits = logits.roll(1, dims=0)
        with torch.no_grad():
            reference = model(input_ids=tokens).logits[:, :-1, :_VOCABULARY].reshape(-1, _VOCABULARY)
    want = torch.log_softmax(reference.double(), dim=-1)
    have = torch.log_softmax(logits.double(), dim=-1)[:, :_VOCABULARY]
    worst = float((want - have).abs().max())
    text = f"max |logprob - transformers' own| {worst:.2g} at {len(want)} positions, {logits.shape[1]} rows"
    return Finding(worst < 1e-4, text, {"worst": worst, "positions": len(want)})


def store_equals_live(*, shift: int = 0) -> Finding:
    """Stored rows are the live teacher's at every position and temperature. ``shift`` plants a misaligned store."""
    import torch

    from latentforge.kernels.targets import TopKTargets
    from latentforge.targets.levels import TAIL_STEP
    from latentforge.targets.row import SequenceTargets
    from latentforge.targets.store import TargetStore
    from latentforge.targets.topk import sequence_rows
    from latentforge.teachers.hf import HFTeacher
    from latentforge.teachers.store import StoreTeacher

    temperatures = (1.0, 2.0)
    with _folder() as folder:
        _tiny_model(folder, seed=1)
        tokens = _tokens(_VOCABULARY)
        teacher = HFTeacher.open(folder)
        path = folder / "targets.sqlite"
        with TargetStore.create(
            path, teacher.identity.as_json(), 8, temperatures, vocab_size=teacher.vocab_size
        ) as store:
            rows = sequence_rows(*teacher.topk(tokens, k=8, temperatures=temperatures), sequences=len(tokens))
            store.put_many(
                (
                    one.numpy(),
                    SequenceTargets(
                        _rolled(row.ids, shift),
                        _rolled(row.logprobs, shift),
                        {t: _rolled(tail, shift) for t, tail in row.tails.items()},
                    ),
                )
                for one, row in zip(tokens, rows, strict=True)
            )
        equal = positions = 0
        worst = 0.0
        with StoreTeacher.open(path, identity=teacher.identity) as stored:
            for temperature in temperatures:
                kept = stored.targets(tokens, temperature=temperature)
                live = teacher.targets(tokens, temperature=temperature, k=8)
                assert isinstance(live, TopKTargets)
                # What the format rounds (see latentforge.targets.levels) is no difference.
                rounded = torch.from_numpy(stored.store.levels.error(live.logprobs.numpy()))
                error = torch.maximum(
                    ((kept.logprobs - live.logprobs).abs() - rounded).amax(-1),
                    (kept.tail - live.tail).abs() - TAIL_STEP / 2,
                )
                equal += int(((kept.ids == live.ids).all(-1) & (error < 1e-4)).sum())
                positions += len(error)
                worst = worse(worst, float(error.max()))
    text = f"{equal} of {positions} stored rows equal the live teacher's (worst {worst:.2g} nats)"
    return Finding(equal == positions, text, {"equal": equal, "positions": positions, "worst": worst})


def teacher_unlike_student(*, compare: str = "content") -> Finding:
    """A copy of the teacher under another name and in other files is refused for full and said for smoke.

    ``compare="name"`` plants the comparison by the folder's name.
    """
    from latentforge.teachers.likeness import check_unlike

    with _folder() as folder:
        teacher, copy, other = folder / "teacher", folder / "student", folder / "other"
        model = _tiny_model(teacher, seed=1)
        _tiny_model(other, seed=2)
        model.save_pretrained(copy, max_shard_size="40KB")
        shards = len(list(copy.glob("*.safetensors")))

        def outcome(student: Path, profile: Any) -> str:
            if compare == "name":
                return "refused" if student.name == teacher.name else "accepted"
            try:
                return "accepted" if check_unlike(teacher, student, profile=profile) is None else "said"
            except RefusedError:
                return "refused"

        found = {
            "copy, full": outcome(copy, "full"),
            "copy, smoke": outcome(copy, "smoke"),
            "other, full": outcome(other, "full"),
        }
    expected = {"copy, full": "refused", "copy, smoke": "said", "other, full": "accepted"}
    text = (
        f"copy in {shards} files: {found['copy, full']} for full, {found['copy, smoke']} for smoke; other model: "
        + (found["other, full"])
    )
    return Finding(found == expected and shards > 1, text, {**found, "shards": shards})


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as name:
        yield Path(name)


def _tokens(vocabulary: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocabulary, (3, _LENGTH), generator=generator)


def _rolled(values: Any, shift: int) -> Any:
    import numpy as np

    return np.ascontiguousarray(np.roll(values, shift, axis=0))


def _tiny_tokenizer(folder: Path) -> None:
    from latentforge.data.tokenizer import train_bpe

    train_bpe(["the other theme there then bathes these others, thence the rest"] * 2, _VOCABULARY, folder)


def _tiny_model(folder: Path, *, seed: int, rows: int = _VOCABULARY) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

    _tiny_tokenizer(folder)
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.4,
        eos_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def _swap_tokens(file: Path, low: int, high: int) -> None:
    value = json.loads(file.read_bytes())
    vocabulary = value["model"]["vocab"]
    by_id = {number: text for text, number in vocabulary.items()}
    vocabulary[by_id[low]], vocabulary[by_id[high]] = high, low
    file.write_text(json.dumps(value))
