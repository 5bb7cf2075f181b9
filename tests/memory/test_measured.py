"""What a run held beside what it was planned to hold, measured on runs of this machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentforge.events import EventLog, read_events
from latentforge.memory import MemoryPlan, Term
from latentforge.train import effective, memory
from latentforge.train.held import watching
from latentforge.train.rehearsal import tiny_run


@pytest.fixture(scope="module")
def runs() -> list[Path]:
    """The folders of the pipeline ``tiny``, run once; what else was rehearsed in this process lies beside them."""
    last = tiny_run()
    names = {last.run, *(ref["run"] for ref in last.load_launch().resolved.values() if "run" in ref)}
    return sorted(last.path.parent / name for name in names)


def test_each_run_says_what_it_was_planned_to_hold_and_what_it_held(runs: list[Path]) -> None:
    seen = set()
    for run in runs:
        kind = run.name.partition("-")[0]
        found = [event.fields for event in read_events(run / "events.jsonl") if event.kind == "memory"]
        if kind == "data":
            assert not found
            continue
        planned, measured = found
        assert planned["planned_own_bytes"] == measured["planned_bytes"]
        assert 0 < measured["measured_bytes"] <= 1.15 * measured["planned_bytes"]
        recorded = json.loads((run / "effective.json").read_bytes())["memory"]
        assert (recorded["measured_bytes"], recorded["over"]) == (measured["measured_bytes"], None)
        assert recorded["terms"]["planned_runtime"] > 0
        seen.add(kind)
    assert seen == {"teacher", "score", "distill"}


def test_a_run_that_holds_far_more_than_its_plan_warns_in_its_log_and_its_record(tmp_path: Path) -> None:
    from latentforge.spec.run import RunDir

    folder = tmp_path / "score-0123456789abcdef0123"
    folder.mkdir()
    run, text = RunDir(folder), io.StringIO()
    with EventLog(run.events_file, run.run, text=text) as log:
        with watching() as watch:
            held = bytearray(os.urandom(1 << 20)) * 300
            peak = watch.peak()
            del held
        found = memory.compare(run, log, MemoryPlan("score", (Term("runtime", 2**20),)), peak, before=watch.before)
    assert found.measured > 300 << 20
    assert "warning: the run held" in text.getvalue()
    assert [event.kind for event in read_events(run.events_file)] == ["memory", "warning"]
    assert effective.read(run)["memory"]["over"].startswith("the run held")


def test_the_peak_of_what_ran_before_in_the_process_is_forgotten() -> None:
    held = bytearray(os.urandom(1 << 20)) * 200
    with watching() as earlier:
        del held
    with watching() as watch:
        assert watch.peak().resident < earlier.before - (100 << 20)


@pytest.fixture(scope="module")
def forty_millions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 41 M parameters in fp32, in three files."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    from latentforge.data.tokenizer import train_bpe

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("forty")
    train_bpe(["the other theme there then"] * 2, 264, folder)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=4096, hidden_size=768, num_hidden_layers=5, num_attention_heads=12, num_key_value_heads=4,
                head_dim=64, intermediate_size=2304, tie_word_embeddings=True, eos_token_id=0, bos_token_id=None,
            )
        )  # fmt: skip
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(0.01)
    model.save_pretrained(folder, max_shard_size="60MB")
    return folder


_LOADED = """
import sys, torch
from pathlib import Path
from latentforge.memory import KnownModel
from latentforge.memory.estimate import Answering, score_memory
from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.precision import open_hf
from latentforge.train.held import watching

folder, asked = Path(sys.argv[1]), sys.argv[2]
known = KnownModel.of_folder(folder)
assert known.largest_file < known.bytes
plan = score_memory(Answering.of(TeacherSpec(precision=asked), known, device="cpu"), rows=4, length=65)
open_hf(folder, "fp32", "cpu").close()  # what loading brings along for the first time is the runtime's
with watching() as watch:
    teacher = open_hf(folder, asked, "cpu")
    teacher.topk(torch.randint(0, 264, (4, 65)), k=8, temperatures=(1.0,))
    held = watch.peak().resident - watch.before
runtime = next(term.bytes for term in plan.terms if term.name == "runtime")
print(held, plan.own_bytes - runtime)
"""


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_loading_and_asking_a_teacher_holds_what_its_terms_say(forty_millions: Path, asked: str) -> None:
    # In a process of its own: what other tests freed, and the allocator kept, would be taken again and not be seen.
    arguments = [sys.executable, "-c", _LOADED, str(forty_millions), asked]
    said = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout
    held, planned = map(int, said.split())
    assert 0.5 * planned < held < 1.15 * planned, f"{held / 2**20:.0f} of {planned / 2**20:.0f} MiB"
