"""``latentforge bench generate``: who is measured, what is written down, and what the command ends with."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from latentforge.cli import main
from latentforge.evidence.digests import file_sha256

from ..latent_folders import CHUNK, Folders

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with prompts.txt: three prompts and a blank line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("def main(\n\nimport os\nThe quick brown fox\n")
    return tmp_path


def _bench(*arguments: object) -> int:
    return main(["bench", "generate", *map(str, arguments), "--max-tokens", "6", "--repeats", "2", "--device", "cpu"])


def _written(place: Path) -> dict[str, Any]:
    (file,) = (place / "results").glob("bench_*.json")
    assert file.with_suffix(".png").read_bytes().startswith(PNG)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_all_contestants_stand_side_by_side_in_the_table_and_in_the_file(
    folders: Folders, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _bench(folders.latent, "--beside", folders.token, "--transformers", "--batch", 2) == 0
    shown, found = capsys.readouterr().out, _written(place)
    names = [one["name"] for one in found["contestants"]]
    assert names == [f"latent, K = {CHUNK}", "token-level", "transformers"]
    assert all(name in shown for name in names)
    latent, token, theirs = found["contestants"]
    assert (latent["chunk"], token["chunk"], found["asked"]["prompts"]) == (CHUNK, 1, 3)
    assert latent["student_over_this"] is None
    for one in (token, theirs):
        lead = [a / b for a, b in zip(*(c["tokens_per_second"]["rounds"] for c in (latent, one)), strict=True)]
        assert (one["student_over_this"]["least"], one["student_over_this"]["greatest"]) == (min(lead), max(lead))
        assert one["digests"] == token["digests"]
        assert one["flops_per_token"] == token["flops_per_token"] > latent["flops_per_token"] > 0
    for one in found["contestants"]:
        assert all(1 <= produced <= one["asked_tokens"] == 18 for produced in one["produced_tokens"])
        seconds = zip(one["produced_tokens"], one["seconds"], strict=True)
        assert one["tokens_per_second"]["rounds"] == [produced / each for produced, each in seconds]
        assert one["first_chunk_s"]["p95"] >= one["first_chunk_s"]["p50"] > 0
        assert one["peak_memory"]["total"] > 50e6
    assert {"processor", "cores", "torch", "threads", "load_average"} <= set(found["machine"])
    assert (found["hit_rate"], found["verdicts"], found["exit_code"]) == (None, [], 0)


def test_a_gate_that_cannot_be_passed_fails_the_command_with_its_line(
    folders: Folders, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _bench(folders.latent, "--min-tokens-per-second", 1e12, "--max-peak-memory-gb", 100) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("F-BENCH-SPEED-001 FAIL ")
    assert lines[-1].startswith("F-BENCH-MEMORY-001 PASS peak memory ")
    assert _written(place)["exit_code"] == 1


def test_a_hit_rate_that_nobody_knows_passes_no_gate(
    folders: Folders, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _bench(folders.latent, "--min-hit-rate", 0) == 3
    assert "F-BENCH-CACHE-001 UNKNOWN hit rate not known" in capsys.readouterr().out


def test_gates_of_a_pipeline_file_are_held_and_a_flag_goes_over_them(
    folders: Folders, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "p.toml").write_text("[bench]\nmin_tokens_per_second = 1e12\nmax_p95_chunk_s = 1e-9\ntemperature = 0.5\n")
    assert _bench(folders.latent, "--spec", "p.toml", "--min-tokens-per-second", 1, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    outcomes = {one["falsifier"]: one["outcome"] for one in found["verdicts"]}
    assert outcomes == {"F-BENCH-SPEED-001": "pass", "F-BENCH-LATENCY-001": "fail"}
    assert (found["asked"]["temperature"], found["asked"]["max_tokens"]) == (0.5, 6)
    assert found == _written(place)


def test_the_quality_of_a_student_is_found_by_its_weights(folders: Folders, place: Path) -> None:
    digest = file_sha256(folders.latent / "out/student/model.safetensors")
    score = {"value": 2.0, "low": 2.5, "high": 3.0}  # a bootstrap's interval need not hold the value
    models = [{"digests": {"student": digest}, "brier_lm": score, "bits_per_byte": None}]
    (place / "q.json").write_text(json.dumps({"models": models}))
    assert _bench(folders.latent, "--beside", folders.token, "--quality", "q.json") == 0
    latent, token = _written(place)["contestants"]
    assert (latent["quality"], token["quality"]) == ({"brier_lm": score, "bits_per_byte": None}, None)


def test_the_same_seed_writes_the_same_number_of_tokens_in_each_round_and_command(
    folders: Folders, place: Path
) -> None:
    counts = []
    for out in ("a", "b"):
        assert _bench(folders.token, "--seed", 5, "--out", out) == 0
        (file,) = (place / out).glob("*.json")
        counts += json.loads(file.read_text())["contestants"][0]["produced_tokens"]
    assert len(set(counts)) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "none.txt"], "--prompts none.txt cannot be read"),
        (["--prompts", "blank.txt"], "--prompts blank.txt holds no prompt"),
        (["--transformers"], "no token-level student is named"),
        (["--batch", "0"], "--batch 0"),
        (["--method", "luck"], "--method luck"),
        (["--top-k", "5"], "method 'tokens' alone knows it"),
        (["--temperature", "0"], "temperature = 0"),
        (["--quality", "none.json"], "--quality none.json cannot be read"),
        (["--quality", "others.json"], "--quality FILE is of other students"),
        (["--spec", "tiny"], "--spec tiny sets nothing of [bench]"),
        (["--run", "."], "is no run's folder"),
        (["--out", "prompts.txt"], "--out prompts.txt cannot be made"),
        (["--beside", "nowhere"], "nowhere does not exist"),
        (["--beside", "other"], "of another tokenizer"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name_and_leaves_no_report(
    folders: Folders, place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (place / "blank.txt").write_text("\n  \n")
    (place / "others.json").write_text(json.dumps({"models": [{"digests": {"student": "0" * 64}}]}))
    if "other" in arguments:
        shutil.copytree(folders.token / "out/student", place / "other")
        tokenizer = json.loads((place / "other/tokenizer.json").read_text())
        (place / "other/tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    assert _bench(folders.latent, *arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(place.glob("results/*"))


def test_a_folder_that_takes_no_file_is_refused_before_anything_is_measured(
    folders: Folders, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("measured, for a report that nobody can write down")

    monkeypatch.setattr("latentforge.writers.bench.run.run", measured)
    assert _bench(folders.latent, "--out", f"/proc/{os.getpid()}") == 2  # there, and nobody can write into it
    assert "no file can be made in it" in capsys.readouterr().err


def test_two_benches_of_one_second_leave_a_report_each(
    folders: Folders, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentforge.writers.bench.report._stamp", lambda time: "2026-01-02T03:04:05Z")
    assert [_bench(folders.token, "--seed", seed) for seed in (1, 2)] == [0, 0]
    written = sorted((place / "results").iterdir())
    assert [file.name for file in written] == [
        "bench_20260102T030405Z.json",
        "bench_20260102T030405Z.png",
        "bench_20260102T030405Z_2.json",
        "bench_20260102T030405Z_2.png",
    ]
    assert [json.loads(file.read_text())["asked"]["seed"] for file in written[::2]] == [1, 2]


def test_a_report_that_is_cut_short_leaves_no_part_of_itself(
    folders: Folders, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("latentforge.writers.bench.report.Report.as_json", stopped)
    assert _bench(folders.token) == 130
    assert not list((place / "results").iterdir())


def test_what_a_report_says_of_times_follows_from_the_readings_in_it(folders: Folders, place: Path) -> None:
    assert _bench(folders.latent, "--beside", folders.token) == 0
    found = _written(place)
    for one in found["contestants"]:
        first, between = one["first_chunk_s"], one["chunk_s"]
        assert [len(turn) for turn in first["rounds"]] == [3, 3]
        assert sum(map(len, between["rounds"])) == sum(one["steps"]) - 6
        for times in (first, between):
            readings = sorted(reading for turn in times["rounds"] for reading in turn)
            assert times["readings"] == len(readings)
            assert times["p95"] == readings[math.ceil(0.95 * len(readings)) - 1]
            assert times["p50"] == readings[math.ceil(0.5 * len(readings)) - 1]


def test_a_mark_of_the_encoding_is_no_part_of_the_first_prompt(folders: Folders, place: Path) -> None:
    sizes = []
    for name, content in (("plain.txt", b"import os\n"), ("marked.txt", b"\xef\xbb\xbfimport os\r\n")):
        (place / name).write_bytes(content)
        assert _bench(folders.token, "--prompts", name, "--out", name + "-out") == 0
        (file,) = (place / (name + "-out")).glob("*.json")
        sizes.append(json.loads(file.read_text())["asked"]["prompts_sha256"])
    assert sizes[0] == sizes[1]
