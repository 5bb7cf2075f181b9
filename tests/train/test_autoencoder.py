"""A run of kind ``autoencoder``: what it leaves, that it resumes as if it had not stopped, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentforge.errors import RefusedError
from latentforge.events import read_events
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.spec.sections import PipelineSpec
from latentforge.students.latent.codec import Codec
from latentforge.train import autoencoder
from latentforge.train.checkpoint import load_checkpoint
from latentforge.train.inprocess import execute_pipeline, plan
from latentforge.train.run import execute
from latentforge.verdicts import ExitCode

STEPS = 12
MakeRun = Callable[..., RunDir]


def short_spec(**changed: Any) -> PipelineSpec:
    """``tiny-autoencoder`` for a few steps, without a gate on what it learns."""
    spec = resolve_pipeline("tiny-autoencoder", env={}).spec
    asked = {"steps": STEPS, "checkpoint_every": 4, "warmup_steps": 2, "batch_size": 4, "require": (), **changed}
    section = type(spec.autoencoder).model_validate({**spec.autoencoder.model_dump(), **asked})
    data = spec.data.model_copy(update={"train_sequences": 64, "heldout_sequences": 8})
    return spec.model_copy(update={"autoencoder": section, "data": data})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs in which the data lies, made once."""
    root = tmp_path_factory.mktemp("prepared")
    execute_pipeline(short_spec(), root, through="data", text=io.StringIO())
    return root / "runs"


@pytest.fixture
def make_run(prepared: Path, tmp_path: Path) -> MakeRun:
    runs = tmp_path / "runs"
    shutil.copytree(prepared, runs)

    def make(*, attempt: int = 1, predecessor: RunDir | None = None, **changed: Any) -> RunDir:
        planned = plan(short_spec(**changed))[-1]
        identity = planned.identity.at_attempt(attempt)
        before = predecessor.run if predecessor else None
        return RunDir.create(
            runs, identity, LaunchRecord(identity.run_id, planned.kin, planned.resolved, predecessor=before)
        )

    return make


def run_here(folder: RunDir) -> tuple[ExitCode, str]:
    text = io.StringIO()
    return execute(folder.path, text=text), text.getvalue()


def steps(run: RunDir) -> dict[int, dict[str, Any]]:
    return {e.fields["step"]: e.fields for e in read_events(run.events_file) if e.kind == "step"}


def metrics(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [e.fields for e in read_events(run.events_file) if e.kind == "metric" and e.fields["name"] == name]


def test_it_leaves_a_codec_of_the_datas_tokenizer_a_report_and_every_value_in_force(make_run: MakeRun) -> None:
    run = make_run()
    code, text = run_here(run)
    assert code is ExitCode.PASS, text
    data = json.loads((run.input_path("data") / "data.json").read_text())
    codec = Codec.open(run.out / "codec", tokenizer_sha256=data["tokenizer_sha256"])
    assert (codec.shape.chunk, codec.shape.vocab_size, codec.shape.latent) == (2, 320, 32)
    assert (run.out / "codec" / "tokenizer.json").is_file()
    report = json.loads((run.out / "metrics.json").read_text())["heldout"]["final"]
    assert codec.record is not None
    assert codec.record.latent_std == report["latent_std"]
    assert report["noisy_accuracy"].keys() == {"0.1", "0.3", "0.5", "0.7"}
    assert len(report["kl"]) == 32

    requested = run.load_identity().spec["autoencoder"]
    effective = json.loads(run.effective_file.read_text())["effective"]["autoencoder"]
    assert effective.keys() == requested.keys()
    assert {**effective, "device": "auto"} == {**requested, "micro_batch_size": 4}

    first, last = metrics(run, "val_loss")
    assert (first["step"], last["step"]) == (0, STEPS)
    assert last["value"] < first["value"]
    for found in metrics(run, "token_accuracy"):
        assert found["tokens"] + found["padding"] == found["places"] == 8 * 128
    assert [found["noise"] for found in metrics(run, "noisy_token_accuracy")] == [0.1, 0.3, 0.5, 0.7] * 2
    for made in steps(run).values():
        assert made["rows"] + made["padding"] == 4 * 128
        assert made["rows"] == made["denominator"]
    assert "final_loss=" in text
    assert "F-ARTEFACT-MOVED-001 PASS" in text


@pytest.mark.slow
def test_two_processes_make_the_codec_that_one_makes_and_another_engine_goes_on_with_it(make_run: MakeRun) -> None:
    # Rows that cannot be shared out evenly, three passes of one process and two of the other.
    asked = {"batch_size": 5, "micro_batch_size": 1}
    alone, together = make_run(**asked), make_run(**asked, distributed="fsdp2", processes=2)
    for run in (alone, together):
        code, text = run_here(run)
        assert code is ExitCode.PASS, text
    ours, theirs = steps(together), steps(alone)
    assert ours.keys() == theirs.keys() == set(range(1, STEPS + 1))
    for step, said in theirs.items():
        for name in ("loss", "ce", "kl", "grad_norm"):
            assert ours[step][name] == pytest.approx(said[name], rel=2e-6), (step, name)
        same = ("rows", "sequences", "denominator", "batch_sha256", "learning_rate", "chunks", "padding")
        assert [ours[step][name] for name in same] == [said[name] for name in same]
    said = json.loads(together.effective_file.read_text())["effective"]
    assert (said["autoencoder"]["distributed"], said["autoencoder"]["processes"]) == ("fsdp2", 2)
    assert said["engine"]["wrapper"] == "FSDPCodecTraining"
    assert said["engine"]["weights"] < 0.51 * said["engine"]["parameters"]

    shutil.rmtree(together.checkpoints / f"step-{STEPS:06d}")
    resumed = make_run(attempt=2, predecessor=together, **asked)
    code, text = run_here(resumed)
    assert code is ExitCode.PASS, text
    assert f"resumes from step {STEPS - 4} of {together.run}" in text
    weights = [load_file(run.out / "codec" / "model.safetensors") for run in (alone, together, resumed)]
    for made in weights[1:]:
        assert max(float((made[name] - value).abs().max()) for name, value in weights[0].items()) < 1e-5
    reports = [json.loads((run.out / "metrics.json").read_text())["heldout"]["final"] for run in (alone, together)]
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=1e-5)


def test_padding_that_is_taken_for_text_fails_the_gate_by_what_the_data_holds(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentforge.train.codec_trainer.valid", lambda ids, eos_id: torch.ones_like(ids).bool())
    run = make_run(require=("F-LATENT-AE-001",))
    code, text = run_here(run)
    assert code is ExitCode.FAIL, text
    padding = metrics(run, "token_accuracy")[-1]["padding"]
    assert padding > 0
    assert f"which with {padding} places of padding are not the 1024 places of the held-out rows" in text


def test_a_run_that_stops_and_resumes_ends_with_the_same_bits(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run()
    assert run_here(whole)[0] is ExitCode.PASS

    # Stopped by a signal after step 6, which is no multiple of checkpoint_every.
    stopped = make_run(attempt=2)
    asked = iter([None] * 5 + ["SIGTERM"])
    monkeypatch.setattr(autoencoder, "stop_requested", lambda: next(asked))
    assert run_here(stopped)[0] is ExitCode.UNKNOWN
    monkeypatch.undo()
    resumed = make_run(attempt=3, predecessor=stopped)
    code, text = run_here(resumed)
    assert code is ExitCode.PASS, text
    assert "resumes from step 6" in text
    assert (resumed.out / "codec" / "model.safetensors").read_bytes() == (
        whole.out / "codec" / "model.safetensors"
    ).read_bytes()
    ends = [load_checkpoint(run.checkpoints / f"step-{STEPS:06d}") for run in (whole, resumed)]
    assert all(torch.equal(ends[0].moments[name], ends[1].moments[name]) for name in ends[0].moments)
    losses = [{step: made["loss"] for step, made in steps(run).items()} for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert [found["step"] for found in metrics(resumed, "val_loss")] == [0, STEPS]


def test_the_codec_of_the_lowest_held_out_loss_is_kept_where_it_is_asked_for(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted, measured = iter((9.0, 3.0, 2.0, 4.0, 2.0)), autoencoder.report_of
    monkeypatch.setattr(autoencoder, "report_of", lambda *of: replace(measured(*of), loss=next(planted)))
    run = make_run(validate_every=3, keep="best", steps=9)
    code, text = run_here(run)
    assert code is ExitCode.PASS, text
    assert "kept: step 6, held-out loss 2.0000; that of step 9, the last, is 4.0000" in text
    saved, kept = Codec.open(run.out / "codec"), load_checkpoint(run.checkpoints / "best" / "step-000006").weights
    assert all(torch.equal(kept[name], value) for name, value in saved.state_dict().items() if name in kept)
    told = [(found["step"], found["value"], found.get("kept", False)) for found in metrics(run, "val_loss")]
    assert told == [(0, 9.0, False), (3, 3.0, False), (6, 2.0, False), (9, 4.0, False), (6, 2.0, True)]
    assert "final_loss=2.0000 (held-out, step 6)" in text


def test_a_gate_that_is_not_passed_fails_the_run(make_run: MakeRun) -> None:
    run = make_run(require=("F-LATENT-AE-001",))
    code, text = run_here(run)
    assert code is ExitCode.FAIL
    assert text.splitlines()[-2].startswith("F-LATENT-AE-001 FAIL")


def test_a_collapsed_codec_raises_an_alarm(make_run: MakeRun) -> None:
    run = make_run(kl_weight=10.0, kl_floor=0.0, steps=40, checkpoint_every=40, require=("F-LATENT-AE-002",))
    code, text = run_here(run)
    assert code is ExitCode.FAIL
    assert "dimensions are collapsed (KL below 0.01 nats)" in text
    alarms = [e for e in read_events(run.events_file) if e.kind == "warning"]
    assert any("collapsed" in e.fields["message"] for e in alarms)


def test_a_loss_that_is_not_finite_ends_the_run_with_nothing_updated(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentforge.students.latent import codec_loss

    real = codec_loss.share_of_loss

    def planted(*arguments: Any) -> Any:
        found = real(*arguments)
        return found._replace(loss=found.loss * float("nan"))

    monkeypatch.setattr(codec_loss, "share_of_loss", planted)
    code, text = run_here(make_run())
    assert code is ExitCode.FAIL
    assert "loss is nan at step 1; nothing was updated" in text


def test_the_runs_of_such_a_pipeline_are_data_and_autoencoder_and_ask_no_teacher() -> None:
    runs = plan(short_spec())
    assert [run.kind for run in runs] == ["data", "autoencoder"]
    assert runs[1].identity.inputs == {"data": f"run:{runs[0].run_id}"}
    assert runs[0].identity.spec["data"]["chunk"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.chunk=3"], "sequence_length = 128 is not a multiple of chunk = 3"),
        (["through=distill", "distill.on_policy=0.5"], "data.chunk = 2 with distill.on_policy = 0.5"),
        (["autoencoder.require=['F-LATENT-AE-01']"], "did you mean 'F-LATENT-AE-001'"),
        (["autoencoder.latent=0"], "autoencoder.latent"),
        (["autoencoder.token_dropout=1.0"], "autoencoder.token_dropout"),
    ],
)
def test_what_makes_no_codec_is_refused_when_it_is_planned(changes: list[str], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        resolve_pipeline("tiny-autoencoder", env={}, overrides=changes)


def test_the_operators_names_set_the_codecs_run_and_those_of_a_student_are_refused() -> None:
    spec = resolve_pipeline("tiny-autoencoder", env={"STEPS": "7", "BATCH_SIZE": "3", "LR": "1e-4"}).spec
    assert (spec.autoencoder.steps, spec.autoencoder.batch_size, spec.autoencoder.learning_rate) == (7, 3, 1e-4)
    assert spec.distill.steps == 500
    with pytest.raises(RefusedError, match=r"ALPHA='0\.3' is of a student, and through = 'autoencoder' makes none"):
        resolve_pipeline("tiny-autoencoder", env={"ALPHA": "0.3"})
