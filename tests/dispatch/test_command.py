"""The command line: quick to start, clear about what it refuses, and honest in its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

ABSENT = "distill-" + "0" * 20
COMMANDS = (
    *("go", "plan", "watch", "status", "cancel", "collect", "enrol", "hosts", "pull", "gc", "preflight", "build"),
)


def test_help_imports_neither_fabric_nor_torch_nor_pydantic(laptop: Any) -> None:
    words = (
        "import sys",
        "from latentforge.cli import main",
        "main(['dispatch', '--help'])",
        "print(sorted(sys.modules))",
    )
    seen = "; ".join(words)
    done = subprocess.run(
        [sys.executable, "-P", "-c", seen], env=laptop.env, capture_output=True, text=True, check=True
    )
    modules = done.stdout.splitlines()[-1]
    for heavy in ("'fabric'", "'paramiko'", "'torch'", "'pydantic'", "'numpy'"):
        assert heavy not in modules
    for command in COMMANDS:
        assert f"  {command} " in done.stdout


def test_a_run_that_is_not_there_has_no_code_of_a_run(laptop: Any) -> None:
    done = laptop.cli("status", ABSENT, "--host", "local")
    assert (done.returncode, done.stdout.split()[2]) == (3, "absent")
    done = laptop.cli("cancel", ABSENT, "--host", "local")
    assert (done.returncode, f"{ABSENT} is not on local" in done.stderr) == (2, True), "a typo has cancelled nothing"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(laptop: Any, command: str) -> None:
    done = laptop.cli(command, "--help")
    assert done.returncode == 0
    assert "Usage: latentforge dispatch" in done.stdout


@pytest.mark.parametrize(
    ("words", "env", "told"),
    [
        (["go", "smok"], {}, ["no recipe is called 'smok'", "did you mean 'smoke'?"]),
        (["go", "tiny", "--host", "gx10"], {}, ["host 'gx10' is not enrolled", "dispatch enrol gx10"]),
        (["go", "tiny"], {"GX10_HOST": "gx10"}, ["host 'gx10' is not enrolled"]),
        (["go", "tiny", "--host", ""], {}, ["--host '' names no host"]),
        (["go", "tiny", "--host", "me@box"], {}, ["dispatch enrol box --user me"]),
        (["go", "tiny", "--host", "me@10.0.0.7:2222"], {}, ["dispatch enrol 10.0.0.7 --user me --port 2222"]),
        (["cancel", ABSENT, "--host", "local"], {"DRY_RUN": "1"}, ["cancel has no preview", "DRY_RUN=0"]),
        (["collect", ABSENT, "--host", "local"], {"DRY_RUN": "1"}, ["collect has no preview"]),
        (["enrol", "127.0.0.1", "--yes"], {"DRY_RUN": "1"}, ["enrol has no preview"]),
        (["cancel", ABSENT], {"DRY_RUN": "yes"}, ["DRY_RUN='yes' is neither 0 nor 1"]),
        (["enrol", "me@box"], {}, ["dispatch enrol box --user me"]),
        (["enrol", "::1"], {}, ["dispatch enrol NAME --address ::1"]),
        (["enrol", "box", "--address", "box:22"], {}, ["--address 'box:22'", "enrol --help"]),
        (["collect", ABSENT, "--host", "local"], {}, [f"{ABSENT} is not on this host"]),
        (["status", "--host", "gx10"], {}, ["host 'gx10' is not enrolled"]),
        (["go", "tiny"], {"EVIDENCE_DIR": "/dev/null"}, ["'/dev/null'", "/dev/null is not a folder"]),
        (["plan", "tiny"], {"EVIDENCE_DIR": "/dev/null/x"}, ["'/dev/null/x'", "/dev/null is not a folder"]),
        (["go", "tiny"], {"STEPS": "5OO"}, ["STEPS='5OO' is not a whole number", "distill.steps"]),
        (["go", "tiny"], {"T": "0"}, ["distill.temperature"]),
        (["go", "tiny", "--set", "distill.stepz=3"], {}, ["distill.stepz", "distill.steps"]),
        (["go", "tiny", "--set", "score.k=5000"], {}, ["score.k = 5000 is larger than the vocabulary"]),
        (["go", "tiny", "--set", "data.corpus=nowhere"], {}, ["data.corpus", "nowhere"]),
        (["go", "tiny", "--set", "teacher.model=/nowhere"], {}, ["teacher.model = '/nowhere'"]),
        (["go", "tiny"], {"DRY_RUN": "yes"}, ["DRY_RUN='yes' is neither 0 nor 1"]),
        (["go", "tiny", "--attempt", "3"], {}, ["--attempt '3' is not known"]),
        (["watch", "distill-1"], {}, ["no run that this laptop knows begins with 'distill-1'"]),
        (["watch", "distill-" + "a" * 20], {}, ["was not dispatched from this laptop", "--host HOST"]),
        (["enrol", "local", "--yes"], {}, ["built in"]),
        (["enrol", "a b", "--yes"], {}, ["'a b' cannot name a host"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_value_and_leaves_nothing(
    laptop: Any, snapshot: Any, words: list[str], env: dict[str, str], told: list[str]
) -> None:
    before = snapshot(laptop.home)
    done = laptop.cli(*words, **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in told:
        assert word in done.stderr
    assert snapshot(laptop.home) == before


def test_an_empty_corpus_and_a_truncated_teacher_are_refused_before_any_run(laptop: Any) -> None:
    (laptop.cwd / "empty").mkdir()
    done = laptop.cli("go", "tiny", "--set", "data.corpus=empty")
    assert done.returncode == 2, done.stdout
    assert "data.corpus" in done.stderr
    folder = laptop.cwd / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    done = laptop.cli("go", "tiny", "--set", "teacher.model=teacher")
    assert done.returncode == 2, done.stdout
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 100)
    done = laptop.cli("go", "tiny", "--set", "teacher.model=teacher")
    assert done.returncode == 2, done.stdout
    assert "teacher.model" in done.stderr
    assert not (laptop.home / "state").exists()


def test_a_corpus_that_cannot_be_enough_is_refused_before_any_run(laptop: Any) -> None:
    (laptop.cwd / "a.txt").write_text("x" * 100)
    done = laptop.cli("go", "tiny", "--set", "data.corpus=a.txt")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "a.txt' is too small: 100 bytes of text for 544 rows of 32 tokens" in done.stderr
    assert not (laptop.home / "state").exists()


def test_a_chat_is_asked_as_little_as_there_is_to_ask(laptop: Any) -> None:
    (laptop.cwd / "a.jsonl").write_text('{"text": "Why?"}\n' * 2)
    (laptop.cwd / "t").mkdir()
    (laptop.cwd / "t" / "config.json").write_text('{"vocab_size": 4}')
    (laptop.cwd / "t" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    chat = ("data.corpus=a.jsonl", "data.documents=chat", "teacher.model=t", "score.k=2")
    wire = ("teacher.backend=openai", "teacher.url=http://127.0.0.1:9/v1")
    done = laptop.cli("go", "tiny", "--dry-run", *(word for one in (*chat, *wire) for word in ("--set", one)))
    assert "too small" not in done.stderr
    assert done.returncode == 0, done.stderr


def test_a_teacher_that_does_not_fit_the_pipeline_is_refused_before_any_run(laptop: Any) -> None:
    def folder(name: str, tokens: str) -> None:
        (laptop.cwd / name).mkdir()
        (laptop.cwd / name / "config.json").write_text('{"vocab_size": 4}')
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        weights = len(header).to_bytes(8, "little") + header + bytes(4)
        (laptop.cwd / name / "model.safetensors").write_bytes(weights)
        if tokens:
            model = {"vocab": {token: number for number, token in enumerate(tokens)}}
            (laptop.cwd / name / "tokenizer.json").write_text(json.dumps({"model": model}))

    def refused(*values: str) -> str:
        done = laptop.cli("go", "tiny", *[word for value in values for word in ("--set", value)])
        assert done.returncode == 2, done.stdout + done.stderr
        assert not (laptop.home / "state").exists()
        return str(done.stderr)

    folder("mute", "")
    folder("teacher", "abcd")
    folder("copy", "abcd")
    folder("swapped", "abdc")
    (laptop.cwd / "text").mkdir()
    (laptop.cwd / "text" / "a.txt").write_text("text" * 10_000)
    assert "has no tokenizer.json" in refused("teacher.model=mute")
    assert "score.k = 16 is larger than the vocabulary of teacher.model" in refused("teacher.model=teacher")
    assert "differ first at id 2: teacher" in refused("teacher.model=teacher", "distill.student.init=swapped")
    full = ("profile=full", "data.corpus=text", "score.k=2")
    assert "are the same model" in refused(*full, "teacher.model=teacher", "distill.student.init=copy")
    assert "are the same model" in refused(*full, "teacher.model=teacher", "distill.student.init=teacher")


def test_dry_run_by_environment_twice_is_byte_identical_and_touches_nothing(laptop: Any, snapshot: Any) -> None:
    before = snapshot(laptop.home)
    first, second = (laptop.process("go", "tiny", DRY_RUN="1") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert "nothing was changed (dry run)" in first.stdout
    as_json = laptop.cli("plan", "tiny", "--json")
    assert json.loads(as_json.stdout)["plan"].startswith(first.stdout.split()[1])
    assert snapshot(laptop.home) == before


def test_status_without_any_run_says_so(laptop: Any) -> None:
    done = laptop.cli("status")
    assert done.returncode == 0
    assert "no run was dispatched from this laptop yet" in done.stdout


def test_the_operator_s_names_reach_the_plan(laptop: Any) -> None:
    plain = json.loads(laptop.cli("plan", "tiny", "--json").stdout)
    changed = json.loads(laptop.cli("plan", "tiny", "--json", STEPS="61", ALPHA="0.4", LR="1.5e-5").stdout)
    ids = [{run["kind"]: run["run"] for run in plan["runs"]} for plan in (plain, changed)]
    assert ids[0]["distill"] != ids[1]["distill"]
    assert [ids[0][kind] for kind in ("data", "teacher", "score")] == [
        ids[1][kind] for kind in ("data", "teacher", "score")
    ]
    assert os.environ.get("STEPS") is None
