"""A whole pipeline whose teacher is a server: scored over HTTP, distilled, with a folder that holds no weights."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from latentforge.cli import main
from latentforge.errors import FailedError
from latentforge.events import read_events
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.sections import PipelineSpec
from latentforge.targets.store import TargetStore
from latentforge.train.inprocess import execute_pipeline

from ..proxy import FaultProxy

KEY = "planted-key-0123456789"
SMALL = """
[data]
sequence_length = 32
train_sequences = 24
heldout_sequences = 4
[score]
k = 20
[distill]
student = { layers = 1, hidden = 32, heads = 2, kv_heads = 1, intermediate = 64 }
steps = 3
batch_size = 4
warmup_steps = 1
"""


@pytest.fixture
def tokenizer_only(served_folder: Path, tmp_path: Path) -> Path:
    """The served model's folder without its weights, as an operator has it of a model that a server holds."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(served_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def pipeline(folder: Path, url: str, *overrides: str) -> PipelineSpec:
    file = folder.parent / "remote.toml"
    file.write_text(SMALL, encoding="utf-8")
    env = {"TEACHER_BACKEND": "vllm-remote", "VLLM_REMOTE_URL": url, "VLLM_REMOTE_API_KEY": KEY}
    flags = [f"teacher.model={folder}", "teacher.served_model=tiny", *overrides]
    return resolve_pipeline(str(file), env=env, overrides=flags).spec


def test_a_served_teacher_scores_once_and_the_student_trains_without_its_weights(
    vllm_url: str, tokenizer_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_REMOTE_API_KEY", KEY)
    cache = tmp_path / "cache.sqlite"
    said = io.StringIO()
    with FaultProxy(vllm_url, key=KEY) as hosted:
        spec = pipeline(tokenizer_only, hosted.url, f"teacher.cache={cache}")
        runs = execute_pipeline(spec, tmp_path / "first", text=said)
        asked = len(hosted.documents)
        with TargetStore.open(runs["score"].out / "targets.sqlite") as store:
            assert store.stats()["rows"] == 28
            assert store.identity["model"] == "served:tiny"
        scored = json.loads((runs["score"].out / "score.json").read_text())
        assert (scored["teacher"]["backend"], scored["teacher"]["url"]) == ("vllm-remote", hosted.url)
        ended = read_events(runs["distill"].events_file)[-1]
        assert (ended.kind, ended.fields["code"]) == ("end", 0)

        # Another run of other meaning, with the same cache read only: nothing of the data is asked a second time.
        before = cache.read_bytes()
        again = pipeline(tokenizer_only, hosted.url, f"teacher.cache={cache}", "teacher.cache_readonly=true", "seed=8")
        execute_pipeline(again, tmp_path / "second", through="score", text=said)
        assert cache.read_bytes() == before
        fresh = hosted.documents[asked:]
    assert KEY not in said.getvalue()
    written = [path for path in (tmp_path / "first").rglob("*") if path.is_file() and path.suffix != ".sqlite"]
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    whole = {len(one) for one in fresh}
    assert 32 not in whole, "documents that were in the cache were asked again"


def test_live_rows_of_a_server_train_a_student(vllm_url: str, tokenizer_only: Path, tmp_path: Path) -> None:
    spec = pipeline(tokenizer_only, vllm_url, "distill.targets=live", "teacher.api_key_env=NOT_A_KEY")
    with pytest.raises(FailedError, match="NOT_A_KEY"):
        execute_pipeline(spec, tmp_path / "keyless", text=io.StringIO())
    teacher = spec.teacher.model_copy(update={"api_key_env": None})
    runs = execute_pipeline(spec.model_copy(update={"teacher": teacher}), tmp_path / "live", text=io.StringIO())
    assert "score" not in runs
    assert read_events(runs["distill"].events_file)[-1].fields["code"] == 0


def test_a_store_that_was_scored_is_a_teacher_of_its_own(vllm_url: str, tokenizer_only: Path, tmp_path: Path) -> None:
    first = pipeline(tokenizer_only, vllm_url)
    first = first.model_copy(update={"teacher": first.teacher.model_copy(update={"api_key_env": None})})
    runs = execute_pipeline(first, tmp_path / "scored", through="score", text=io.StringIO())
    store = tmp_path / "kept.sqlite"
    shutil.copyfile(runs["score"].out / "targets.sqlite", store)
    file = tmp_path / "stored.toml"
    file.write_text(SMALL, encoding="utf-8")
    flags = [f"teacher.model={tokenizer_only}", f"teacher.store={store}"]
    spec = resolve_pipeline(str(file), env={}, overrides=flags).spec
    assert spec.teacher.backend == "store"
    again = execute_pipeline(spec, tmp_path / "stored", text=io.StringIO())
    assert set(again) == {"data", "distill"}
    assert read_events(again["distill"].events_file)[-1].fields["code"] == 0


def test_a_plan_with_a_server_wants_no_weights_and_counts_no_teacher_in_memory(
    vllm_url: str,
    tokenizer_only: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    file = tmp_path / "remote.toml"
    file.write_text(SMALL, encoding="utf-8")
    words = ["dispatch", "plan", str(file), "--host", "local", "--json", "--set", f"teacher.model={tokenizer_only}"]
    words += ["--set", "teacher.backend=vllm-remote", "--set", f"teacher.url={vllm_url}"]
    main(words)
    said = capsys.readouterr().out
    assert "no weights" not in said
    assert vllm_url in said
    assert '"score"' in said
    # Control: the same folder for a teacher in this process is refused for its weights.
    assert main([*words[:8], "--set", "teacher.backend=hf"]) == 2
    assert "has no weights" in capsys.readouterr().err
