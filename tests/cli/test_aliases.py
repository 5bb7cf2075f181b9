"""The targets of the first LatentForge: each is one command that works, and what it is given really arrives there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TARGETS = [
    *("check-api", "toy", "train-ae", "train-student", "train-student-venice", "train-student-vllm-local"),
    *("train-student-vllm-remote", "train-student-deepspeed", "train-student-deepspeed-zero3", "serve-vllm-local"),
    *("infer", "serve", "bench", "test-e2e"),
]
OURS = re.compile(r"PROCESSES|STEPS|EPOCHS|BATCH_SIZE|LR|T|ALPHA|K|D|SEED|PORT|PROMPT|(MAKE|TEACHER|VENICE|VLLM).*")


def make(target: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """One target without the set-up, in this interpreter's environment."""
    clean = {name: value for name, value in os.environ.items() if not OURS.fullmatch(name)}
    command = ["make", "--no-print-directory", "-o", "setup", target, f"BIN={BIN}", *words]
    return subprocess.run(command, cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=240)


@pytest.fixture
def planned(tmp_path: Path) -> Any:
    """The values in force of the pipeline that a train- target would do: its command, previewed in place of done."""

    def of(target: str, *words: str, **env: str) -> dict[str, Any]:
        shown = make(target, *words, "-n", **env)
        assert shown.returncode == 0, shown.stderr
        line = shown.stdout.replace("\\\n", " ").strip().splitlines()[-1]
        before, command, rest = line.partition(f"{BIN}/latentforge dispatch go ")
        assert command, line
        show = f"{before} {BIN}/latentforge spec show --json {rest}"
        clean = {name: value for name, value in os.environ.items() if not OURS.fullmatch(name)}
        given = dict(word.partition("=")[::2] for word in words)  # make puts its variables into the environment
        found = subprocess.run(
            ["bash", "-c", show], cwd=tmp_path, env=clean | given | env, capture_output=True, text=True, timeout=60
        )
        assert found.returncode == 0, found.stderr
        return {field: one["value"] for field, one in json.loads(found.stdout)["values"].items()}

    return of


def test_every_target_of_the_first_is_there() -> None:
    text = (ROOT / "aliases.mk").read_text(encoding="utf-8")
    assert set(TARGETS) <= {name for line in re.findall(r"^([a-z0-9 -]+):", text, re.M) for name in line.split()}


def test_what_the_codecs_target_is_given_reaches_its_run(planned: Any) -> None:
    values = planned("train-ae", "DATA=texts.jsonl", "K=2", "D=64", "BATCH_SIZE=4", "EPOCHS=2", "SEED=5")
    assert (values["through"], values["data.chunk"], values["autoencoder.latent"]) == ("autoencoder", 2, 64)
    assert (values["data.corpus"], values["autoencoder.batch_size"], values["seed"]) == ("texts.jsonl", 4, 5)
    assert values["autoencoder.steps"] == 2 * values["data.train_sequences"] // 4


def test_what_the_students_target_is_given_reaches_its_run(planned: Any) -> None:
    values = planned("train-student", "K=8", "STEPS=9", "KD_W=0.25", "MSE_W=0.5", "CE_W=0.125", RECIPE="smoke-latent")
    assert (values["through"], values["data.chunk"], values["latent.steps"]) == ("latent", 8, 9)
    assert [values[f"latent.{name}_weight"] for name in ("token_kd", "mse", "ce")] == [0.25, 0.5, 0.125]
    assert planned("train-student")["latent.mse_weight"] == 0


def test_a_teachers_target_takes_its_backend_and_the_signals_that_it_can_give(planned: Any, tmp_path: Path) -> None:
    venice = planned("train-student-venice", TEACHER_REPO="/t", VENICE_API_KEY="k", VENICE_MODEL="m")
    assert (venice["teacher.backend"], venice["data.documents"], venice["teacher.served_model"]) == (
        "venice",
        "chat",
        "m",
    )
    assert venice["latent.sample_weight"] == venice["latent.tempered_weight"] == 0 < venice["latent.token_kd_weight"]
    local = planned("train-student-vllm-local", VLLM_LOCAL_MODEL="/t")
    assert (local["teacher.backend"], local["teacher.model"]) == ("vllm-local", "/t")
    remote = planned("train-student-vllm-remote", VLLM_REMOTE_URL="http://127.0.0.1:9/v1", TEACHER_REPO="/t")
    assert (remote["teacher.backend"], remote["teacher.url"]) == ("vllm-remote", "http://127.0.0.1:9/v1")


def test_the_whole_lines_tests_are_there() -> None:
    shown = make("test-e2e", "-n", "-o", f"{ROOT}/.venv/.dev", "-o", ".venv/.dev").stdout.splitlines()[-1]
    files = [word for word in shown.split() if word.endswith(".py")]
    assert len(files) > 1
    assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize(("target", "stage"), [("train-student-deepspeed", 2), ("train-student-deepspeed-zero3", 3)])
def test_the_deepspeed_targets_shard_the_student_that_train_student_trains(
    planned: Any, target: str, stage: int
) -> None:
    values = planned(target, "K=4", "STEPS=9", "PROCESSES=2", RECIPE="smoke-latent")
    assert (values["latent.distributed"], values["latent.processes"]) == (f"deepspeed-zero{stage}", 2)
    same = planned("train-student", "K=4", "STEPS=9", RECIPE="smoke-latent")
    spread = {"latent.distributed", "latent.processes"}
    assert {name: value for name, value in values.items() if name not in spread} == {
        name: value for name, value in same.items() if name not in spread
    }
    assert planned(target, RECIPE="smoke-latent")["latent.processes"] == 1


def test_a_prompt_of_any_characters_is_the_one_that_is_continued(folders: Any) -> None:
    prompt = """--it's "$HOME" `x` \\ %s"""
    asked = {"LATENT": str(folders.latent), "PROMPT": prompt, "MAX_TOKENS": "7", "SEED": "3", "TEMP": "1"}
    done = make("infer", **asked)
    assert done.returncode == 0, done.stderr
    command = [str(BIN / "latentforge"), "generate", "--max-tokens", "7", "--seed", "3"]
    command += ["--", str(folders.latent), prompt]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, again.returncode) == (again.stdout, 0)


def test_the_bench_of_a_student_is_measured_on_the_prompts_that_are_named(folders: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("import os\n")
    where = {"PROMPTS_FILE": str(tmp_path / "p.txt"), "RESULTS": str(tmp_path / "out")}
    done = make("bench", LATENT=str(folders.latent), MAX_TOKENS="8", **where)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert [file.suffix for file in sorted((tmp_path / "out").iterdir())] == [".json", ".png"]


def test_the_newest_student_is_looked_for_where_runs_are_kept(tmp_path: Path) -> None:
    kept = tmp_path / "a place of runs"
    for age, run in ((200, "latent-old"), (100, "latent-new")):
        record = kept / run / "out" / "student" / "student.json"
        record.parent.mkdir(parents=True)
        record.write_text("{}")
        os.utime(record, (1e9 - age, 1e9 - age))
    done = make("infer", "-n", EVIDENCE_DIR=str(kept))
    assert f"-- '{kept}/latent-new/out/student' " in done.stdout, done.stderr


def test_without_a_student_the_next_command_is_named(tmp_path: Path) -> None:
    done = make("infer", f"--include-dir={ROOT}", "NEWEST=")
    assert done.returncode == 2
    assert "there is no latent student below runs/: make train-student" in done.stderr
