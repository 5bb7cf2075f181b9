"""Real folders of tiny students, for what needs one that writes: trained in seconds, once a session.

``tests/conftest.py`` offers them as the fixture ``folders``. They are not to be changed: copy before you break one.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from latentforge.data.corpus import Corpus, read_all
from latentforge.data.tokenizer import Tokenizer, copy_tokenizer, train_bpe
from latentforge.students.causal import ModelShape, Student, new_model
from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.chunks import chunked, valid
from latentforge.students.latent.codec import Codec, CodecShape, new_codec
from latentforge.students.latent.codec_loss import CodecObjective, codec_loss, noise_of
from latentforge.students.latent.energy import EnergySettings
from latentforge.students.latent.signals import text_signal
from latentforge.students.latent.student import LatentShape, LatentStudent, TokenSignal

CHUNK, ROW, VOCABULARY = 4, 64, 320
DOCUMENT = 240  # characters


@dataclass(frozen=True)
class Folders:
    """Folders of runs (``out/student`` below each) of a latent and a token-level student, both of the same tokenizer,
    width and depth, trained on short pieces of the standard library; ``rows`` int64 [R, 64] is that text, in chunks
    of 4."""

    latent: Path
    token: Path
    rows: Tensor


def build(root: Path) -> Folders:
    """Train and save all of it below ``root``; the same weights each time on one machine."""
    tokenizer = train_bpe(library_texts(), VOCABULARY, root / "tokenizer")
    rows = _rows(tokenizer)
    _codec(rows, tokenizer, root / "codec")
    latent, token = root / "latent", root / "distill"
    _latent(rows, tokenizer, root / "codec", latent / "out" / "student")
    _token(rows, tokenizer, token / "out" / "student")
    return Folders(latent, token, rows)


def library_texts() -> list[str]:
    """The standard library's sources, by name."""
    corpus = Corpus.open("stdlib")
    entries = [*corpus.entries(heldout=False), *corpus.entries(heldout=True)]
    return [one.text for one in read_all(sorted(entries, key=lambda entry: entry.name))]


def _rows(tokenizer: Tokenizer, count: int = 256) -> Tensor:
    ids: list[int] = []
    pieces = (text[at : at + DOCUMENT] for text in library_texts() for at in (0, 2000, 4000))
    for _, found in tokenizer.encode(piece for piece in pieces if piece):
        ids += found.tolist()
        ids += [tokenizer.eos_id] * (-len(ids) % CHUNK)
        if len(ids) >= count * ROW:
            break
    return torch.tensor(ids[: count * ROW]).reshape(count, ROW)


def _batches(rows: Tensor, size: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [rows[torch.randint(len(rows), (size,), generator=generator)] for _ in range(steps)]


def _codec(rows: Tensor, tokenizer: Tokenizer, folder: Path, steps: int = 80) -> None:
    codec = new_codec(CodecShape(VOCABULARY, CHUNK, latent=32, width=32, inner=64), seed=1)
    optimiser = torch.optim.AdamW(codec.parameters(), lr=1e-2)
    objective = CodecObjective(0.1, 0.1, 0.001, 0.5)
    for step, batch in enumerate(_batches(rows, 8, steps)):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        chunks = chunked(batch, CHUNK).flatten(0, 1)
        codec_loss(codec, chunks, valid(chunks, tokenizer.eos_id), objective, noise_of(1, step)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    codec.save(folder, eos_id=tokenizer.eos_id, tokenizer_sha256=tokenizer.sha256, latent_std=1.0)
    copy_tokenizer(tokenizer.folder, folder)


def _latent(rows: Tensor, tokenizer: Tokenizer, codec_folder: Path, folder: Path, steps: int = 25) -> None:
    codec = Codec.open(codec_folder)
    shape = LatentShape(VOCABULARY, CHUNK, 32, DecoderShape(2, 64, 4, 2, 96), head_blocks=1, noise=16, tempered=True)
    student = LatentStudent.new(shape, seed=1, energy=EnergySettings(draws=2, samples=4))
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for step, batch in enumerate(_batches(rows, 8, steps)):
        chunks = chunked(batch, CHUNK)
        holds = valid(chunks, tokenizer.eos_id)
        energy = {"text": text_signal(codec, chunks, holds, denominator=float(holds[:, 1:].any(-1).sum()))}
        tokens = TokenSignal(None, float(holds[:, 1:].sum()), 1.0, 0.0)
        student(chunks, holds, step * 1000 + torch.arange(len(batch)), energy=energy, tokens=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert codec.record is not None
    known = {"eos_id": tokenizer.eos_id, "tokenizer_sha256": tokenizer.sha256}
    student.save(folder, **known, codec_sha256=codec.record.digest)
    copy_tokenizer(tokenizer.folder, folder)
    shutil.copytree(codec_folder, folder / "codec")


def _token(rows: Tensor, tokenizer: Tokenizer, folder: Path, steps: int = 60) -> None:
    model = new_model(
        ModelShape(2, 64, 4, 2, 96), vocab_size=VOCABULARY, positions=ROW, eos_id=tokenizer.eos_id, seed=1
    )
    student = Student(model, VOCABULARY)
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for batch in _batches(rows, 8, steps):
        holds = valid(chunked(batch, CHUNK), tokenizer.eos_id).flatten(1)
        labels = batch.masked_fill(~holds, -100)[:, 1:].flatten()
        F.cross_entropy(student.logits(batch), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    copy_tokenizer(tokenizer.folder, folder)
