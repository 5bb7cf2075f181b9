"""Building data in several processes, under a kill, and in bounded memory: the same bytes, or none."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from latentforge.data import build_shards, workers
from latentforge.data import telling as tellings
from latentforge.data.build import READ_ORDER
from latentforge.data.corpus import Corpus
from latentforge.data.telling import Telling, Told
from latentforge.data.tokenizer import Tokenizer, train_bpe
from latentforge.data.workers import Encoding
from latentforge.errors import CrashedError, RefusedError
from latentforge.evidence.digests import file_sha256

ASKED = {"vocab_size": 300, "sequence_length": 64, "heldout_sequences": 4}
PRODUCTS = ("train.bin", "heldout.bin", READ_ORDER, "data.json", "tokenizer/tokenizer.json")


def write_corpus(path: Path, documents: int, words: int = 60) -> Path:
    generator = random.Random(3)
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(documents):
            text = " ".join(generator.choices(["the", "other", "grüße", "return", "self.x", "\n", "'ll"], k=words))
            stream.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("c") / "a.jsonl", 400)


def digests(out: Path) -> dict[str, str]:
    return {name: file_sha256(out / name) for name in PRODUCTS}


def workers_now() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize("rows", [None, 30])
def test_the_number_of_processes_changes_no_byte(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    monkeypatch.setattr(workers, "_BATCH_BYTES", 3000)
    made = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        build_shards(corpus, out, **ASKED, train_sequences=rows, processes=processes)  # type: ignore[arg-type]
        made.append(digests(out))
    assert made[0] == made[1]
    assert not workers_now(), "workers end with the work"


def test_a_worker_that_is_killed_ends_the_work_by_name_and_a_refusal_in_one_is_the_works(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_BATCH_BYTES", 3000)
    tokenizer = train_bpe(["the other return"] * 9, 262, tmp_path / "tokenizer")
    copy = tmp_path / "a.jsonl"
    copy.write_bytes(corpus.read_bytes())
    opened = Corpus.open(copy)
    encoded = Encoding(tokenizer, None, 2)(opened.entries(heldout=False))
    next(encoded)
    copy.write_bytes(copy.read_bytes().replace(b"other", b"OTHER"))
    with pytest.raises(RefusedError, match="changed while it was read"):
        list(encoded)
    encoded = Encoding(tokenizer, None, 2)(Corpus.open(corpus).entries(heldout=False))
    next(encoded)
    for worker in workers_now():
        worker.kill()
    with pytest.raises(CrashedError, match="one of 2 processes that tokenize was ended"):
        list(encoded)


CHILD = """
import sys; from pathlib import Path
from latentforge.data import build_shards, workers
workers._BATCH_BYTES = 3000
build_shards(sys.argv[1], Path(sys.argv[2]), processes=2, train_sequences=None,
             vocab_size=300, sequence_length=64, heldout_sequences=4)
"""


def test_a_build_that_is_killed_leaves_no_torn_shard_and_the_next_one_is_whole(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(corpus), str(tmp_path / "out")]
    subprocess.run([*command[:4], str(tmp_path / "whole")], check=True)
    wanted = digests(tmp_path / "whole")
    generator = random.Random(0)
    for product in ("tokenizer/tokenizer.json", "heldout.bin.partial", "train.bin.partial"):
        child = subprocess.Popen(command)
        while child.poll() is None and not (tmp_path / "out" / product).exists():
            time.sleep(0.002)
        time.sleep(generator.random() * 0.02)
        workers_of = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
        child.kill()
        child.wait()
        assert not psutil.wait_procs(workers_of, timeout=30)[1], "workers end with who began them"
        for name in ("train.bin", "heldout.bin"):
            left = tmp_path / "out" / name
            assert not left.exists() or file_sha256(left) == wanted[name]
    subprocess.run(command, check=True)
    assert digests(tmp_path / "out") == wanted
    names = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    assert names == {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")}


def peak(corpus: Path, out: Path) -> int:
    code = (
        "import sys, resource; from pathlib import Path; from latentforge.data import build_shards; "
        "build_shards(sys.argv[1], Path(sys.argv[2]), vocab_size=300, sequence_length=64, train_sequences=None, "
        "heldout_sequences=4, processes=1); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    made = subprocess.run([sys.executable, "-c", code, str(corpus), str(out)], check=True, capture_output=True)
    return int(made.stdout) * 1024


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    small, large = (write_corpus(tmp_path / f"{n}.jsonl", n, words=600) for n in (600, 6_000))
    grown = peak(large, tmp_path / "large") - peak(small, tmp_path / "small")
    difference = large.stat().st_size - small.stat().st_size
    assert difference > 16_000_000
    assert grown < difference / 2


def test_a_tokenizer_that_is_not_known_is_said_to_be_slow_and_progress_is_told_in_bytes(
    corpus: Path, tmp_path: Path
) -> None:
    train_bpe(["the other return"] * 9, 262, tmp_path / "teacher")
    content = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(content))
    lines: list[str] = []
    told: list[tuple[str, int, int]] = []
    telling = Telling(say=lines.append, progress=lambda *at: told.append(at))
    out = tmp_path / "out"
    asked = {**ASKED, "tokenizer_folder": tmp_path / "teacher", "train_sequences": None}
    build_shards(corpus, out, **asked, telling=telling)  # type: ignore[arg-type]
    assert lines == ["documents are encoded by the tokenizers library, slowly: its normalizer is Lowercase"]
    index = Corpus.open(corpus).index
    assert told[0] == ("corpus", corpus.stat().st_size, corpus.stat().st_size)
    assert told[-1] == ("tokenize", index.bytes(heldout=False), index.bytes(heldout=False))
    assert Tokenizer.open(out / "tokenizer").vocab_size == 262


def test_a_phase_that_has_read_nothing_after_half_a_minute_tells_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, now = list[str](), iter([0.0, 31.0, 62.0])
    monkeypatch.setattr(tellings.time, "monotonic", lambda: next(now))
    told = Told(Telling(say=lines.append), "corpus")
    told(0, 100_000_000)
    assert lines == []
    told(50_000_000, 100_000_000)
    assert lines == ["corpus: 50 of 100 MB, 0.8 MB/s, 62 s left at most"]
