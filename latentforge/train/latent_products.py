"""What a latent run leaves: a folder that can be written with, and a few texts as proof of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentforge.data.shards import ShardSet
from latentforge.data.tokenizer import copy_tokenizer
from latentforge.events import EventLog
from latentforge.spec.run import RunDir
from latentforge.students.latent.codec import Codec
from latentforge.students.latent.generate import Request, generate
from latentforge.students.latent.student import LatentStudent
from latentforge.train.latent_falsifiers import MODEL
from latentforge.train.products import say_saved
from latentforge.train.samples import NEW_TOKENS, PROMPTS
from latentforge.writers.opening import CODEC_FOLDER, open_writer


def save_writer(
    run: RunDir,
    log: EventLog,
    student: LatentStudent,
    codec: Codec,
    weights: Mapping[str, Tensor],
    data: ShardSet,
    *,
    start: dict[str, str],
    step: int,
) -> None:
    """Save ``out/student`` whole: student, tokenizer and, in ``codec/``, the codec that it was trained with.

    FailedError where what is on disk is not what was trained.
    """
    assert codec.record is not None  # an opened codec has one
    folder, partial = run.out / "student", run.out / "student.whole"
    shutil.rmtree(partial, ignore_errors=True)
    known = {"tokenizer_sha256": data.tokenizer_sha256, "codec_sha256": codec.record.digest}
    student.save(partial, eos_id=data.eos_id, **known)
    copy_tokenizer(data.tokenizer_dir, partial)
    shutil.copytree(run.input_path("codec") / "codec", partial / CODEC_FOLDER)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    say_saved(student, weights, folder, start=start, log=log, step=step, model=MODEL)


def written(folder: Path, data: ShardSet, device: torch.device) -> list[dict[str, Any]]:
    """Held-out beginnings, the text that followed, and what the saved student goes on with at T = 1."""
    model = open_writer(folder, device=str(device)).model
    backend = data.tokenizer().backend
    new = min(NEW_TOKENS, data.sequence_length // 2)
    given = min(data.sequence_length - new, 2 * new) // data.chunk * data.chunk
    rows = data.heldout.rows(np.arange(min(PROMPTS, len(data.heldout))))

    def decode(ids: Any) -> str:
        return str(backend.decode(list(ids), skip_special_tokens=False))

    told = []
    for row in rows:
        ended = np.flatnonzero(row[:given] == data.eos_id)
        # The document that goes on there, from its first chunk in this row.
        begin = int(ended[-1]) // data.chunk * data.chunk + data.chunk if len(ended) else 0
        if begin == given:
            continue
        prompt = tuple(int(one) for one in row[begin:given])
        found = generate(model, [Request(prompt, new, seed=0)])[0]
        told.append({"prompt": decode(prompt), "text": decode(row[given : given + new]), MODEL: decode(found.tokens)})
    return told
