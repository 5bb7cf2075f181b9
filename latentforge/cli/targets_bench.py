"""``latentforge targets bench``: the store's figures on rows of a teacher of a large vocabulary, trained here."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from latentforge.cli.terminal import print_json


def bench(
    teacher: Annotated[Path | None, typer.Option(help="Model folder; made in ROOT by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of packed rows (out of a data run); made in ROOT.")] = None,
    root: Annotated[Path, typer.Option(help="Where data and teacher are made, and kept for the next time.")] = Path(
        "bench-targets"
    ),
    corpus: Annotated[
        Path | None, typer.Option(help="Folder of .py files (default: this environment's packages).")
    ] = None,
    vocabulary: Annotated[int, typer.Option(help="Size of the byte-level BPE and of the teacher.")] = 151_936,
    steps: Annotated[int, typer.Option(help="Steps that the teacher is trained.")] = 240,
    k: Annotated[int, typer.Option(help="Entries a row.")] = 50,
    temperatures: Annotated[str, typer.Option(help="T for which tails are stored.")] = "1",
    sequences: Annotated[int, typer.Option(help="Held-out sequences that are scored and stored.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure bytes a token, tokens a second and the gradient's error on a teacher's rows of held-out text."""
    import torch

    from latentforge.cli.progress import Progress
    from latentforge.data.shards import ShardSet
    from latentforge.errors import RefusedError
    from latentforge.kernels.bench.machine import cpu_name
    from latentforge.targets import bench as measuring
    from latentforge.targets.topk import sequence_rows
    from latentforge.teachers.hf import HFTeacher

    if (teacher is None) != (data is None):
        raise RefusedError("--teacher and --data belong together: rows are measured on the text of that vocabulary")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with Progress() as progress:
        if teacher is None or data is None:
            progress.tell("making data and teacher")
            teacher, data = _make(root, corpus, vocabulary, steps)
        shards, model = ShardSet.open(data), HFTeacher.open(teacher)
        wanted = tuple(float(t) for t in temperatures.split(","))
        tokens = shards.heldout.rows(list(range(min(sequences, len(shards.heldout)))))
        rows: list[Any] = []
        for number, sequence in enumerate(tokens):
            progress.tell(f"scoring {number}/{len(tokens)}")
            found = model.topk(torch.from_numpy(sequence[None]), k=k, temperatures=wanted)
            rows.append((sequence, sequence_rows(*found, sequences=1)[0]))
        progress.tell("measuring")
        with tempfile.TemporaryDirectory(prefix="latentforge-bench-") as folder:
            figures = measuring.measure(rows, Path(folder), vocab_size=model.vocab_size)
        dense = model.logits(torch.from_numpy(tokens[:1]))[:64, : model.vocab_size]
        errors = {
            f"T={t:g}": {
                f"{d:g}": measuring.gradient_error(dense, k=k, temperature=t, distance=d) for d in measuring.DISTANCES
            }
            for t in wanted
        }
    said = {
        "machine": cpu_name(),
        "teacher": {
            "parameters": model.folder.parameters,
            "vocabulary": model.vocab_size,
            "sha256": model.folder.sha256,
        },
        "figures": figures.as_json(),
        "gradient_error": errors,
    }
    if as_json:
        print_json(said)
        return
    parts = ", ".join(f"{name} {value:.1f}" for name, value in figures.streams.items())
    print(f"{said['machine']}, one thread, processor time; k = {k}, vocabulary {model.vocab_size}")
    print(f"  {figures.tokens} tokens in sequences of {figures.sequence_length}; mass outside {figures.tail_mass:.1%}; "
          f"{figures.different_ids:.0f} different ids a sequence")  # fmt: skip
    print(f"  bytes a token    file {figures.file_bytes:.1f}, rows {figures.packed_bytes:.1f} ({parts})")
    print(f"  tokens a second  written {figures.write_tokens:,.0f}, read {figures.read_tokens:,.0f} ({figures.reader}; "
          f"unpacked in numpy {figures.read_tokens_numpy:,.0f})")  # fmt: skip
    for name, by_distance in errors.items():
        shown = ", ".join(f"{error:.2%} at {distance} nats" for distance, error in by_distance.items())
        print(f"  gradient error   {name}: {shown} of noise between student and teacher")


def _make(root: Path, corpus: Path | None, vocabulary: int, steps: int) -> tuple[Path, Path]:
    """Model folder and data folder of a teacher trained on the Python sources below ``corpus``."""
    import sys

    from latentforge.spec.sections import DataSpec, PipelineSpec, TeacherSpec
    from latentforge.train.inprocess import execute_pipeline

    root.mkdir(parents=True, exist_ok=True)
    file = root / "corpus.jsonl"
    if not file.is_file():
        _gather(corpus, file)
    spec = PipelineSpec(
        data=DataSpec(
            corpus=str(file.absolute()),
            vocab_size=vocabulary,
            sequence_length=128,
            train_sequences=4096,
            heldout_sequences=512,
        ),
        teacher=TeacherSpec(
            layers=2,
            hidden=128,
            heads=4,
            kv_heads=2,
            intermediate=384,
            steps=steps,
            batch_size=8,
            learning_rate=4e-3,
            warmup_steps=12,
        ),
    )
    runs = execute_pipeline(spec, root, through="teacher", text=sys.stderr)
    return runs["teacher"].out / "model", runs["data"].out


def _gather(corpus: Path | None, file: Path) -> None:
    """Every different .py file below a folder as one line of a .jsonl; what is not UTF-8 is left out."""
    import hashlib
    import json

    import torch

    folder = corpus if corpus is not None else Path(torch.__file__).resolve().parents[1]
    seen: set[bytes] = set()
    temporary = file.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as out:
        for path in sorted(folder.rglob("*.py")):
            try:
                text = path.read_text("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if text.strip() and "\0" not in text and digest not in seen:
                seen.add(digest)
                out.write(json.dumps({"text": text}) + "\n")
    temporary.replace(file)
