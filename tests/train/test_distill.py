"""The recipe ``distill``: what it refuses, what it says, and what its verdicts do."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from latentforge.data.shards import ShardSet
from latentforge.data.tokenizer import copy_tokenizer
from latentforge.errors import FailedError, RefusedError
from latentforge.events import Event, read_events
from latentforge.evidence.configuration import compare_configuration
from latentforge.evidence.reading import read_run
from latentforge.spec.run import RunDir
from latentforge.spec.sections import DistillSpec, PipelineSpec
from latentforge.students.adapters import Lora, adapt, merged
from latentforge.students.causal import ModelShape, Student, cast_weights, model_from_folder, new_model
from latentforge.train import assembly, distill, effective, products
from latentforge.train.checkpoint import load_checkpoint
from latentforge.train.engines import choice
from latentforge.train.inprocess import execute_pipeline, plan
from latentforge.train.loop import evaluate
from latentforge.train.optimiser import MasterOptimiser, Updates
from latentforge.train.rehearsal import tiny_events, tiny_run, tiny_spec
from latentforge.train.run import execute
from latentforge.train.setting import evaluation_batches
from latentforge.verdicts import ExitCode

MakeRun = Callable[..., RunDir]
RunHere = Callable[[RunDir], tuple[ExitCode, str]]


def verdicts(events: list[Event]) -> dict[str, str]:
    return {e.fields["falsifier"]: e.fields["outcome"] for e in events if e.kind == "verdict"}


def test_tiny_passes_every_falsifier_and_says_what_it_did() -> None:
    run, events = tiny_run(), tiny_events()
    assert set(verdicts(events).values()) == {"pass"}
    assert {"F-DISTILL-SMOKE-001", "F-DISTILL-SMOKE-002", "F-EFFECTIVE-CONFIG-001"} <= set(verdicts(events))
    assert events[-1].kind == "end"
    assert events[-1].fields["code"] == 0
    said = effective.read(run)
    assert said["kernel_backend"] in ("cpu", "reference")
    assert said["requested"] == run.load_identity().spec
    assert said["effective"]["distill"]["micro_batch_size"] == 16
    assert said["device"]["threads"] == 1
    assert {"student", "twin"} == set(said["flops"])
    assert said["peak_memory_bytes"] > 0
    assert {"train", "twin", "save"} <= set(said["timings"])
    assert all(len(value["sha256"]) == 64 for value in said["inputs"].values())
    metrics = json.loads((run.out / "metrics.json").read_text())
    assert metrics["models"]["student"]["final"]["val_kl"] < metrics["models"]["twin"]["final"]["val_kl"]
    sample = json.loads((run.out / "samples.json").read_text())[0]
    assert {"prompt", "text", "teacher", "student", "twin"} == set(sample)


def test_scoring_is_said_to_cost_one_reading_by_the_teachers_weights_not_by_its_checkpoints_too() -> None:
    scored = tiny_run().input_run("targets")
    assert scored is not None
    made = json.loads((scored.out / "score.json").read_text())
    weights = sum(one.numel() for one in load_file(scored.input_path("teacher") / "model/model.safetensors").values())
    tokens = made["sequences"] * 32
    assert effective.read(scored)["flops"]["score"] == pytest.approx(2 * weights * tokens, rel=0.05)


def test_every_run_of_the_line_reports_each_value_that_was_asked_for() -> None:
    run = tiny_run()
    line = [run, *(source for name in ("data", "teacher", "targets") if (source := run.input_run(name)) is not None)]
    assert len(line) == 4
    for one in line:
        identity = one.load_identity()
        compared = compare_configuration(identity.kind, identity.spec, effective.read(one))
        assert (one.run, compared["unreported"], compared["differences"]) == (one.run, [], [])


def test_a_step_event_carries_what_was_in_force() -> None:
    steps = [e.fields for e in tiny_events() if e.kind == "step"]
    assert len(steps) == 120
    assert {s["model"] for s in steps} == {"student", "twin"}
    assert all(s["rows"] == s["denominator"] == 16 * 31 and s["sequences"] == 16 for s in steps)
    assert all("kd" in s for s in steps if s["model"] == "student")
    assert not any("kd" in s for s in steps if s["model"] == "twin")


def test_student_and_twin_have_the_same_start_and_the_same_data() -> None:
    first = {
        (e.fields["model"], e.fields["name"]): e.fields["value"]
        for e in tiny_events()
        if e.kind == "metric" and e.fields["step"] == 0
    }
    assert first["student", "val_loss"] == first["twin", "val_loss"]
    steps = [e.fields for e in tiny_events() if e.kind == "step" and e.fields["step"] == 1]
    assert steps[0]["ce"] == steps[1]["ce"]


def test_a_frozen_student_fails_001_and_the_run_ends_in_order() -> None:
    run, events = tiny_run(frozen=True), tiny_events(frozen=True)
    found = verdicts(events)
    assert found["F-DISTILL-SMOKE-001"] == "fail"
    assert found["F-ARTEFACT-MOVED-001"] == "fail"
    assert found["F-EFFECTIVE-CONFIG-001"] == "pass"
    assert events[-1].fields["code"] == 1
    assert len([e for e in events if e.kind == "step"]) == 120
    assert (run.out / "student" / "model.safetensors").is_file()


def test_without_kd_the_student_is_its_own_twin_and_002_fails() -> None:
    events = tiny_events(kd_weight=0.0)
    final = [e.fields["value"] for e in events if e.kind == "metric" and e.fields["name"] == "val_kl"]
    assert final[1] == final[3]
    assert verdicts(events)["F-DISTILL-SMOKE-002"] == "fail"
    assert events[-1].fields["code"] == 1


def test_the_saved_student_is_a_normal_folder(make_run: MakeRun, run_here: RunHere) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = make_run()
    run_here(run)
    folder = run.out / "student"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("import os", return_tensors="pt").input_ids
    assert model(ids).logits.shape[-1] == 320
    assert tokenizer.decode(ids[0]) == "import os"


def test_ce_weight_0_gives_the_twin_cross_entropy_to_train_on(make_run: MakeRun, run_here: RunHere) -> None:
    run = make_run(ce_weight=0.0, kd_weight=1.0, require=("F-DISTILL-SMOKE-002",))
    run_here(run)
    final = [e.fields for e in read_events(run.events_file) if e.kind == "step" and e.fields["model"] == "twin"][-1]
    assert final["loss"] == pytest.approx(final["ce"])


def test_bf16_keeps_fp32_masters_in_its_checkpoints_and_saves_bf16(make_run: MakeRun, run_here: RunHere) -> None:
    run = make_run(precision="bf16", micro_batch_size=5)
    code, text = run_here(run)
    assert code == 0, text
    checkpoint = load_file(run.checkpoints / "step-000024" / "model.safetensors")
    saved = load_file(run.out / "student" / "model.safetensors")
    assert {t.dtype for t in checkpoint.values()} == {torch.float32}
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert effective.read(run)["effective"]["distill"]["precision"] == "bf16"
    assert effective.read(run)["effective"]["micro_batches"] == 4


def test_activations_computed_again_change_no_bit_of_a_run_and_are_read_back_from_the_layers(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"steps": 4, "require": ()}
    kept, again = make_run(**few), make_run(**few, activation_checkpointing=True)
    for run, asked in ((kept, False), (again, True)):
        assert run_here(run)[0] is ExitCode.PASS
        assert effective.read(run)["effective"]["distill"]["activation_checkpointing"] is asked
    ours, theirs = (load_file(run.out / "student" / "model.safetensors") for run in (again, kept))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    monkeypatch.setattr(Student, "checkpoint_activations", lambda self: None)
    code, text = run_here(make_run(**few, attempt=2, activation_checkpointing=True))
    assert code is ExitCode.FAIL
    assert "activation_checkpointing = True asked, False in force" in text


def adapting(init: Path, **more: Any) -> dict[str, Any]:
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ("q_proj", "down_proj")}
    return {"init": str(init), "lora": lora, "steps": 8, "learning_rate": 0.01, **more}


@pytest.fixture
def base(upstream: Path, tmp_path: Path) -> Path:
    """A folder to adapt: a student that has not been trained, with the data's tokenizer."""
    folder = tmp_path / "base"
    shape = ModelShape(layers=2, hidden=32, heads=2, kv_heads=1, intermediate=48)
    data = ShardSet.open(next(upstream.glob("data-*")) / "out")
    sizes = {"vocab_size": data.vocab_size, "positions": data.sequence_length, "eos_id": data.eos_id}
    new_model(shape, **sizes, seed=5).save_pretrained(folder)
    copy_tokenizer(data.tokenizer_dir, folder)
    return folder


def test_adapters_alone_are_trained_merged_into_a_plain_folder_and_resumed_to_the_bit(
    make_run: MakeRun, run_here: RunHere, base: Path
) -> None:
    whole = make_run(**adapting(base))
    code, text = run_here(whole)
    assert code is ExitCode.PASS, text
    found = verdicts(read_events(whole.events_file))
    assert {found["F-ARTEFACT-MOVED-001"], found["F-ARTEFACT-FROZEN-001"]} == {"pass"}
    product = next(e.fields for e in read_events(whole.events_file) if e.fields.get("product"))
    assert (product["moved"], product["tensors"], product["frozen_changed"]) == (8, 8, [])
    asked = {**adapting(base)["lora"], "target_modules": ["q_proj", "down_proj"]}
    assert effective.read(whole)["effective"]["distill"]["lora"] == asked
    start, made = (load_file(folder / "model.safetensors") for folder in (base, whole.out / "student"))
    assert start.keys() == made.keys()
    changed = {name.split(".")[-2] for name, value in made.items() if not torch.equal(value, start[name])}
    assert changed == {"q_proj", "down_proj"}
    kept = load_checkpoint(whole.checkpoints / "step-000008")
    assert all(".lora_" in name for name in kept.weights)
    # What is merged answers as base and adapter do through peft.
    from peft import PeftModel

    text_rows = torch.randint(0, 64, (2, 9))
    plain, adapted = model_from_folder(whole.out / "student"), model_from_folder(base)
    beside = PeftModel.from_pretrained(adapted, whole.out / "adapter").eval()
    assert torch.allclose(plain.eval()(text_rows).logits, beside(text_rows).logits, atol=1e-5)

    shutil.rmtree(whole.checkpoints / "step-000008")
    resumed = make_run(**adapting(base), attempt=2, predecessor=whole)
    code, text = run_here(resumed)
    assert "student resumes from step 4" in text
    assert code is ExitCode.PASS, text
    again = load_file(resumed.out / "student" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in made.items())


def test_adapters_in_bf16_learn_through_activations_computed_again_and_what_is_said_is_of_the_merged_folder(
    make_run: MakeRun, run_here: RunHere, base: Path
) -> None:
    wanted = {"precision": "bf16", "validate_every": 3, "keep": "best"}
    again, kept = (make_run(**adapting(base, **wanted, activation_checkpointing=on)) for on in (True, False))
    for run in (again, kept):
        code, text = run_here(run)
        assert code is ExitCode.PASS, text
    ours, theirs, start = (
        load_file(folder / "model.safetensors") for folder in (again.out / "student", kept.out / "student", base)
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    changed = {name.split(".")[-2] for name, value in ours.items() if not torch.equal(value, start[name].bfloat16())}
    assert changed == {"q_proj", "down_proj"}
    product = next(e.fields for e in read_events(again.events_file) if e.fields.get("product"))
    assert (product["moved"], product["tensors"], product["frozen_changed"]) == (8, 8, [])
    assert effective.read(again)["effective"]["parameters"] == sum(value.numel() for value in ours.values())
    # What is held against the start is what the folder answers, rounded as it is, and not what was trained beside it.
    data = ShardSet.open(again.input_path("data"))
    model = model_from_folder(again.out / "student")
    cast_weights(model, torch.bfloat16)
    student = Student(model, data.vocab_size)
    size = effective.read(again)["effective"]["distill"]["batch_size"]
    rows = evaluation_batches(data.heldout, torch.device("cpu"), at_most=size)
    loss = evaluate(student, rows, None, temperature=1.0, backend="auto").loss
    told = [e.fields for e in read_events(again.events_file) if e.fields.get("name") == "val_loss"]
    assert [(one["step"], one.get("kept", False)) for one in told] == [*((n, False) for n in (0, 3, 6, 8)), (8, True)]
    near = pytest.approx(loss, rel=3e-7)  # measured here without the KL, in another sum
    assert [one["value"] == near for one in told[-2:]] == [False, True]
    found = read_run(again.path).metric("val_loss", model="student")
    assert found is not None
    assert found.kept == (8, told[-1]["value"])
    verdict = next(
        e.fields for e in read_events(again.events_file) if e.fields.get("falsifier") == "F-DISTILL-SMOKE-001"
    )
    assert verdict["measured"]["val_loss"] == told[-1]["value"]


def test_a_base_weight_that_is_trained_beside_its_adapters_fails_the_run(
    make_run: MakeRun, run_here: RunHere, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfrozen(model: Any, lora: Any, *, seed: int) -> None:
        adapt(model, lora, seed=seed)
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)

    monkeypatch.setattr(assembly, "adapt", unfrozen)
    run = make_run(**adapting(base))
    code, text = run_here(run)
    assert code is ExitCode.FAIL, text
    assert verdicts(read_events(run.events_file))["F-ARTEFACT-FROZEN-001"] == "fail"
    assert "changed: model.layers.0.mlp.up_proj.weight" in text


def test_a_merge_that_touches_what_has_no_adapter_fails_the_run(
    make_run: MakeRun, run_here: RunHere, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(start: Any, *given: Any) -> Any:
        model = merged(start, *given)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
        return model

    monkeypatch.setattr(assembly, "merged", wrong)
    run = make_run(**adapting(base))
    code, text = run_here(run)
    assert code is ExitCode.FAIL, text
    assert verdicts(read_events(run.events_file))["F-ARTEFACT-FROZEN-001"] == "fail"
    assert "changed: out/student: model.layers.0.mlp.up_proj.weight" in text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"init": None}, "there is nothing to adapt"),
        ({"frozen": True}, "its adapters would not be trained"),
        ({"distributed": "ddp"}, "adapters are trained by one process"),
    ],
)
def test_adapters_that_could_not_be_trained_are_refused_when_the_spec_is_read(
    asked: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=said):
        tiny_spec(**{**adapting(tmp_path), **asked})


def test_a_module_that_is_not_there_or_that_the_loss_reads_itself_is_no_target() -> None:
    model = new_model(ModelShape(1, 32, 2, 1, 48), vocab_size=64, positions=9, eos_id=0, seed=1)
    for targets, said in ((("q_proj", "c_attn"), "the student has no c_attn"), (("lm_head",), "read by the loss")):
        with pytest.raises(RefusedError, match=said):
            adapt(model, Lora(2, 4.0, 0.0, targets), seed=1)


def test_held_out_text_is_measured_in_no_larger_passes_than_are_trained() -> None:
    class Rows:
        def __len__(self) -> int:
            return 70

        def rows(self, numbers: np.ndarray) -> np.ndarray:
            return np.stack([numbers, numbers], 1)

    for asked, most in (({"micro_batch_size": 3}, 3), ({"batch_size": 5}, 5), ({"batch_size": 64}, 32)):
        job = SimpleNamespace(
            spec=DistillSpec(**asked), data=SimpleNamespace(heldout=Rows()), device=torch.device("cpu")
        )
        batches = list(distill.held_out_batches(job))
        assert max(len(batch) for batch in batches) == most
        assert torch.cat(batches)[:, 0].tolist() == list(range(70))


def test_a_temperature_without_stored_tails_runs_on_live_dense_targets(make_run: MakeRun, run_here: RunHere) -> None:
    run = make_run(temperature=2.0)
    assert "targets" not in run.load_launch().resolved
    code, text = run_here(run)
    assert code == 0, text
    assert effective.read(run)["effective"]["distill"]["targets"] == "live"


def test_a_trainer_that_drops_the_learning_rate_is_stopped_before_step_1(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(MasterOptimiser):
        def __init__(self, model: Any, updates: Updates) -> None:
            super().__init__(model, replace(updates, learning_rate=1e-3))

    monkeypatch.setattr(choice, "MasterOptimiser", Deaf)
    run = make_run()
    code, text = run_here(run)
    assert code == 1
    assert "learning_rate = 0.003 asked, 0.001 in force" in text
    assert not any(e.kind == "step" for e in read_events(run.events_file))


def test_an_input_that_was_altered_is_refused(make_run: MakeRun, run_here: RunHere) -> None:
    run = make_run()
    shard = run.input_path("data") / "heldout.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    code, text = run_here(run)
    assert code == 2
    assert "out/heldout.bin is not what that run wrote" in text


def test_an_input_run_that_did_not_pass_is_refused(make_run: MakeRun, run_here: RunHere) -> None:
    run = make_run()
    source = run.input_run("targets")
    assert source is not None
    lines = source.events_file.read_text().splitlines(keepends=True)
    source.events_file.write_text("".join(lines[:-1]))
    code, text = run_here(run)
    assert code == 2
    assert f"input 'targets': run {source.run} has not ended" in text


def test_a_store_of_another_teacher_is_refused(make_run: MakeRun, run_here: RunHere) -> None:
    run = make_run()
    teacher = run.input_run("teacher")
    assert teacher is not None
    file = teacher.out / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    teacher.artifacts_file.unlink()
    code, text = run_here(run)
    assert code == 2
    assert "the store was filled by teacher" in text


def test_code_other_than_planned_is_refused(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    import latentforge.train.run as train_run

    class Other:
        digest = "0" * 64

    run = make_run()
    monkeypatch.setattr(train_run, "running_code", Other)
    code, text = run_here(run)
    assert code == 2
    assert "this process runs 000000000000…" in text


def test_a_run_that_was_started_is_not_started_again(make_run: MakeRun, run_here: RunHere) -> None:
    run = make_run(steps=2)
    run_here(run)
    before = run.events_file.read_bytes()
    with pytest.raises(RefusedError, match="was started before"):
        execute(run.path)
    assert run.events_file.read_bytes() == before


def test_a_folder_that_is_no_run_is_refused_without_a_trace(tmp_path: Path) -> None:
    folder = tmp_path / ("distill-" + "0" * 20)
    folder.mkdir()
    with pytest.raises(RefusedError, match=r"identity\.json is missing"):
        execute(folder)
    assert list(folder.iterdir()) == []


def test_a_bug_ends_the_run_as_crashed_with_its_traceback(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(distill, "evaluate", broken)
    run = make_run()
    code, text = run_here(run)
    assert code == 5
    assert "Traceback (most recent call last)" in text
    end = read_events(run.events_file)[-1]
    assert (end.kind, end.fields["code"], end.fields["reason"]) == ("end", 5, "ZeroDivisionError: planted")


def from_teacher(run: RunDir) -> str:
    return str(run.input_path("teacher") / "model")


@pytest.mark.parametrize(("profile", "code"), [("smoke", 0), ("full", 2)])
def test_a_student_that_starts_as_its_teacher_is_said_or_refused(
    make_run: MakeRun, run_here: RunHere, profile: str, code: int
) -> None:
    init = from_teacher(make_run(steps=3))
    run = make_run(init=init, profile=profile, steps=4)
    found, text = run_here(run)
    assert "teacher and student are the same model" in text
    if code == 2:
        assert found == 2
    else:
        assert any(e.kind == "warning" and "same model" in e.fields["message"] for e in read_events(run.events_file))
        assert any("already answers as its teacher" in line for line in text.splitlines())
        assert effective.read(run)["effective"]["distill"]["student"]["init"].startswith("sha256:")


def test_the_plan_of_the_same_pipeline_is_the_same(make_run: MakeRun) -> None:
    spec = PipelineSpec()
    assert [p.run_id for p in plan(spec)] == [p.run_id for p in plan(spec)]


def test_a_student_folder_with_one_swapped_token_is_refused(
    make_run: MakeRun, run_here: RunHere, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(from_teacher(make_run(steps=3)), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    code, text = run_here(make_run(init=str(folder), steps=4))
    assert code == 2
    assert "vocabularies differ first at id 300" in text


def test_a_student_folder_of_too_few_positions_is_refused(make_run: MakeRun, run_here: RunHere, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(from_teacher(make_run(steps=3)), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    code, text = run_here(make_run(init=str(folder), steps=4))
    assert code == 2
    assert "data.sequence_length = 32 is longer than the student's 16 positions" in text


def test_a_run_that_did_not_pass_in_this_process_is_named_when_it_is_asked_for_again(tmp_path: Path) -> None:
    def pipeline() -> None:
        execute_pipeline(tiny_spec(), tmp_path, through="data", text=io.StringIO(), accept=lambda kind, code: False)

    with pytest.raises(FailedError, match="ended with pass"):
        pipeline()
    with pytest.raises(FailedError, match=r"data-[0-9a-f]{20} was run here before and is not whole"):
        pipeline()


def test_a_saved_student_that_is_not_the_trained_one_fails_the_run(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(file: Path) -> dict[str, torch.Tensor]:
        tensors = load_file(file)
        tensors["model.norm.weight"] += 1.0
        return tensors

    monkeypatch.setattr(products, "load_file", other)
    code, text = run_here(make_run(steps=2))
    assert code == 1
    assert "1 tensor(s) on disk are not what was trained: model.norm.weight" in text
