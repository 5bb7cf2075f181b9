"""``latentforge memory``: the arithmetic as people and programs read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def memory(*words: str) -> tuple[int, str]:
    found = subprocess.run(
        [sys.executable, "-m", "latentforge", "memory", *words], capture_output=True, text=True, check=False
    )
    return found.returncode, found.stdout + found.stderr


def test_every_term_of_every_stage_the_mode_and_its_reason_are_shown() -> None:
    code, said = memory("tiny", "--host-memory", "128GiB", "--device", "cuda")
    assert code == 0
    for word in ("stage teacher", "stage score", "stage distill", "activations", "margin 15.4, ceiling 112.6 GiB"):
        assert word in said
    assert "* sequential  fits" in said
    assert "mode sequential: targets are stored" in said


def test_the_plan_is_that_of_the_dotenv_by_which_the_run_would_be_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    Path(".env").write_text("TEACHER_BACKEND=vllm-local\nVLLM_LOCAL_MODEL=m\n")
    assert "engine host" in memory("tiny", "--host-memory", "128GiB")[1]


def test_a_program_reads_the_same_numbers() -> None:
    code, said = memory("tiny", "--host-memory", "128GiB", "--device", "cpu", "--json")
    value = json.loads(said)
    assert code == 0
    assert value["mode"] == "sequential"
    assert set(value["modes"]) == {"sequential", "alternating", "concurrent"}
    for stage in value["modes"]["sequential"]["stages"]:
        assert stage["bytes"] == sum(term["bytes"] for term in stage["terms"])
        assert stage["conditions"][0]["need"] == stage["bytes"] + 128 * 2**30 * 12 // 100


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("tiny", "--host-memory", "500MiB"), 1, "FAILS"),
        (
            ("tiny", "--host-memory", "500MiB", "--set", "distill.targets=live"),
            1,
            "next: set distill.targets = 'store'",
        ),
        (("tiny", "--host-memory", "128GiB", "--set", "teacher.model=/nowhere"), 3, "is not known"),
        (("tiny", "--host-memory", "much"), 2, "'much' is no size"),
        (("tiny", "--mode", "both"), 2, "'both' is none of sequential, alternating, concurrent"),
    ],
)
def test_what_does_not_fit_or_is_not_known_has_its_exit_code_and_its_words(
    words: tuple[str, ...], code: int, said: str
) -> None:
    found, text = memory(*words)
    assert (found, said in text) == (code, True), text


def test_a_folder_on_this_machine_is_counted_from_its_config(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3", "vocab_size": 151_936, "num_hidden_layers": 28, "hidden_size": 1024, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("tiny", "--host-memory", "128GiB", "--set", f"teacher.model={tmp_path}", "--device", "cpu", "--json")
    value = json.loads(memory(*words)[1])
    (score,) = (s for s in value["modes"]["sequential"]["stages"] if s["stage"] == "score")
    assert score["terms"][0] == {"name": "teacher", "bytes": 4 * 596_049_920, "elsewhere": False}
