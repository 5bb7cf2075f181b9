"""A run made again from its identity and its inputs: the same bits, or how far from them and why."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentforge.cli import main
from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.digests import tree_sha256
from latentforge.evidence.reading import read_run
from latentforge.evidence.tensors import tensor_digests
from latentforge.spec.run import RunDir
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.likeness import Likeness, compare_executions
from latentforge.train.rehearsal import tiny_spec
from latentforge.train.reproduce import Reproduction, Setting, reproduce
from latentforge.train.rerun import Rerun, lay_out
from latentforge.train.run import verify_inputs
from latentforge.verdicts import ExitCode, Outcome

WEIGHTS = "out/student/model.safetensors"
THREADS = Setting(("device threads: 1 then, 2 now",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A distill run of six steps beside its inputs, executed in this process."""
    spec = tiny_spec(steps=6, checkpoint_every=3, warmup_steps=2, require=("F-DISTILL-SMOKE-001",))
    small = {
        "teacher": spec.teacher.model_copy(update={"steps": 6}),
        "data": spec.data.model_copy(update={"train_sequences": 64, "heldout_sequences": 8}),
    }
    root = tmp_path_factory.mktemp("trained")
    return execute_pipeline(spec.model_copy(update=small), root, text=io.StringIO())["distill"]


def test_a_run_made_again_on_this_machine_has_the_same_bits(trained: RunDir, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.path.parent.rglob("*")}
    found = reproduce(trained.path, Rerun(tmp_path))
    assert found.setting.differs == ()
    like = found.likeness
    assert like == Likeness(like.compared, (), 0.0, None, like.values, 0.0, None, like.verdicts, ())
    assert like.compared > 5
    assert like.values > 4
    assert like.verdicts > 5
    assert found.outcome is Outcome.PASS
    same = f"{like.values} values of metrics and {like.verdicts} verdicts the same"
    assert found.lines()[0] == f"bit-equal  {like.compared} tensors and shards of {trained.run}, {same}"
    assert {path: path.stat().st_mtime_ns for path in trained.path.parent.rglob("*")} == before
    with pytest.raises(RefusedError, match="fresh folder"):
        reproduce(trained.path, Rerun(tmp_path))


def test_what_was_read_of_a_teacher_is_named_tensor_by_tensor(trained: RunDir) -> None:
    teacher = trained.input_path("teacher")
    files = {path.relative_to(teacher).as_posix(): path for path in teacher.rglob("*.safetensors")}
    kept = {name: path for name, path in files.items() if not name.startswith("checkpoints/")}
    read = json.loads(trained.effective_file.read_bytes())["inputs"]
    assert read["teacher"]["tensors"] == {name: tensor_digests(path) for name, path in kept.items()}
    assert len(next(iter(read["teacher"]["tensors"].values()))) > 5
    assert "tensors" not in read["data"]


def test_on_another_thread_count_it_is_within_tolerance_and_says_so(
    trained: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = json.loads(trained.effective_file.read_bytes())["device"]["threads"]
    asked = ["evidence", "reproduce", str(trained.path), "--threads", str(threads + 1)]
    assert main([*asked, "--json", "--to", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["folder"]) == ("pass", str(tmp_path / trained.run))
    assert found["setting"] == [f"device threads: {threads} then, {threads + 1} now"]
    assert found["distance"] <= found["tolerance"]


def altered(trained: RunDir, runs: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the run whose weights were changed."""
    copied = runs / trained.run
    shutil.copytree(trained.path, copied)
    tensors = load_file(copied / WEIGHTS)
    change(tensors)
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    return copied


def last_bit(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name].view(torch.int32).view(-1)[0] ^= 1


def test_one_bit_of_one_weight_fails_on_the_same_setting_and_is_named(trained: RunDir, tmp_path: Path) -> None:
    copied = altered(trained, tmp_path, last_bit)
    likeness = compare_executions(read_run(trained.path), read_run(copied))
    assert len(likeness.different) == 1
    assert likeness.different[0].startswith(f"{WEIGHTS} ")
    assert 0 < likeness.distance < 1e-4
    same = Reproduction(trained.run, copied, likeness, Setting(), 1e-2)
    assert same.outcome is Outcome.FAIL
    assert any(likeness.different[0] in line for line in same.lines())
    other = Reproduction(trained.run, copied, likeness, THREADS, 1e-2)
    assert other.outcome is Outcome.PASS
    assert other.lines()[0].startswith("within tolerance")
    assert other.lines()[-1] == "not as the first time: device threads: 1 then, 2 now"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({name: value * 1.1 for name, value in tensors.items()}),
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"] * 1.02}),
        lambda tensors: tensors.pop(sorted(tensors)[0]),
        lambda tensors: tensors.update({sorted(tensors)[0]: tensors[sorted(tensors)[0]] * float("nan")}),
        lambda tensors: tensors.update({name: value.double() for name, value in tensors.items()}),
    ],
    ids=["scaled", "one small tensor scaled", "missing", "nan", "other type"],
)
def test_other_weights_fail_on_any_setting(
    trained: RunDir, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    likeness = compare_executions(read_run(trained.path), read_run(altered(trained, tmp_path, change)))
    assert Reproduction(trained.run, tmp_path, likeness, THREADS, 1e-2).outcome is Outcome.FAIL


def retold(trained: RunDir, runs: Path, kind: str, *, at: int = -1, name: str | None = None, **said: object) -> Path:
    """A copy of the run, its weights as they were, whose log says something else in one event of that kind."""
    copied = runs / trained.run
    shutil.copytree(trained.path, copied)
    events = [json.loads(line) for line in (copied / "events.jsonl").read_text().splitlines()]
    [event for event in events if event["kind"] == kind and name in (None, event.get("name"))][at] |= said
    (copied / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return copied


def judged(first: Path, second: Path, setting: Setting, tolerance: float = 1e-2) -> Reproduction:
    return Reproduction(first.name, second, compare_executions(read_run(first), read_run(second)), setting, tolerance)


@pytest.mark.parametrize("at", [0, -1], ids=["of the first step", "of the last"])
def test_the_same_bits_with_another_metric_are_not_reproduced_and_it_is_named(
    trained: RunDir, tmp_path: Path, at: int
) -> None:
    value = read_run(trained.path).metrics[0].values[0]
    copied = retold(trained, tmp_path, "metric", name="val_loss", at=at, value=value * 1.5)
    found = judged(trained.path, copied, Setting())
    assert found.likeness.bit_equal
    assert found.outcome is Outcome.FAIL
    assert "val_loss heldout at step" in found.lines()[0]
    assert found.lines()[0].startswith("NOT REPRODUCED  0 of")


def test_the_same_bits_with_a_metric_within_tolerance_need_another_setting(trained: RunDir, tmp_path: Path) -> None:
    value = read_run(trained.path).metrics[0].values[0]
    copied = retold(trained, tmp_path, "metric", at=0, value=value * (1 + 1e-9))
    assert judged(trained.path, copied, Setting()).outcome is Outcome.FAIL
    assert judged(trained.path, copied, THREADS).outcome is Outcome.PASS
    assert judged(trained.path, copied, THREADS, 1e-12).outcome is Outcome.FAIL


def test_nan_in_one_log_is_a_difference_and_the_same_nan_in_both_is_none(trained: RunDir, tmp_path: Path) -> None:
    copied = retold(trained, tmp_path, "metric", value="nan")
    found = judged(trained.path, copied, THREADS)
    assert found.outcome is Outcome.FAIL
    assert found.likeness.metrics == float("inf")
    assert found.as_json()["metrics"] is None
    assert found.likeness.metric is not None
    assert judged(copied, copied, Setting()).outcome is Outcome.PASS


@pytest.mark.parametrize(
    ("kind", "said", "word"),
    [
        ("verdict", {"outcome": "fail"}, "pass then, fail now"),
        ("verdict", {"falsifier": "F-OTHER-001"}, "F-OTHER-001: none then, pass now"),
        ("end", {"code": 1}, "exit code: 0 then, 1 now"),
    ],
    ids=["fails now", "another one", "exit code"],
)
def test_the_same_bits_with_another_verdict_fail_on_any_setting_and_it_is_said(
    trained: RunDir, tmp_path: Path, kind: str, said: dict[str, object], word: str
) -> None:
    copied = retold(trained, tmp_path, kind, **said)
    for setting in (Setting(), THREADS, Setting((), ("the processor",))):
        found = judged(trained.path, copied, setting)
        assert found.outcome is Outcome.FAIL
        assert word in "\n".join(found.lines())
        assert any(word in line for line in found.as_json()["turned"])


def test_bits_that_differ_where_the_processor_was_not_recorded_are_no_verdict(trained: RunDir, tmp_path: Path) -> None:
    copied = altered(trained, tmp_path, last_bit)
    unknown = Setting((), ("the processor: not recorded then, A now",))
    found = judged(trained.path, copied, unknown)
    assert found.outcome is Outcome.UNKNOWN
    assert found.lines()[-1] == "not compared: the processor: not recorded then, A now"
    assert not [line for line in found.lines() if "threads, processor and versions" in line]
    assert judged(trained.path, copied, unknown, 1e-12).outcome is Outcome.FAIL


def test_a_tolerance_is_said_as_it_was_asked_for(trained: RunDir, tmp_path: Path) -> None:
    assert "up to 0.0125 apart" in judged(trained.path, trained.path, THREADS, 0.0125).lines()[-1]
    assert len(judged(trained.path, trained.path, Setting()).lines()) == 1
    found = judged(trained.path, altered(trained, tmp_path, last_bit), THREADS, 0.0125)
    assert "(relative; tolerance 0.0125)" in found.lines()[0]


@pytest.mark.parametrize("text", ["inf", "nan", "1e999", "1", "-1"])
def test_a_tolerance_that_accepts_anything_is_refused(
    trained: RunDir, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evidence", "reproduce", str(trained.path), "--tolerance", text]) == ExitCode.REFUSED
    assert "unexpected" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["/nowhere", "/", "/etc/passwd", ""])
def test_an_interpreter_that_is_none_is_refused_before_anything_is_made(
    trained: RunDir, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = tmp_path / "fresh"
    asked = ["evidence", "reproduce", str(trained.path), "--to", str(fresh), "--python", text]
    assert main(asked) == ExitCode.REFUSED
    assert "unexpected" not in capsys.readouterr().err
    assert not fresh.exists()


def test_inputs_in_a_folder_that_is_none_are_refused(trained: RunDir, tmp_path: Path) -> None:
    for place in ("/etc/passwd", "a" * 5000, "", str(tmp_path / "nowhere")):
        assert main(["evidence", "reproduce", str(trained.path), "--inputs", place]) == ExitCode.REFUSED


def test_a_run_that_leaves_nothing_to_compare_is_refused_at_once(trained: RunDir, tmp_path: Path) -> None:
    score = next(trained.path.parent.glob("score-*"))
    with pytest.raises(RefusedError, match="nothing to compare"):
        reproduce(score, Rerun(tmp_path / "fresh"))
    assert not (tmp_path / "fresh").exists()


def test_an_input_that_changed_or_is_not_here_is_refused_by_name(trained: RunDir, tmp_path: Path) -> None:
    alone = tmp_path / "alone" / trained.run
    shutil.copytree(trained.path, alone)
    with pytest.raises(RefusedError, match=r"is not here: (data|teacher|score)-") as caught:
        reproduce(alone, Rerun(tmp_path / "fresh"))
    assert "--inputs" in str(caught.value.next)
    teacher = next(trained.path.parent.glob("teacher-*"))
    for source in trained.path.parent.glob("[dts]*-*"):
        if source.name != trained.run:
            shutil.copytree(source, tmp_path / "inputs" / source.name)
    weights = next((tmp_path / "inputs" / teacher.name).rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RefusedError, match=f"{teacher.name} is not what {trained.run} read"):
        reproduce(alone, Rerun(tmp_path / "fresh", (tmp_path / "inputs",)))
    assert not (tmp_path / "fresh").exists()


def copied_line(trained: RunDir, root: Path) -> RunDir:
    """The run and its inputs, all in a folder of their own, to be changed."""
    return RunDir(shutil.copytree(trained.path.parent, root / "runs") / trained.run)


def test_an_input_keeps_its_digest_where_its_checkpoints_stayed_on_the_host(trained: RunDir, tmp_path: Path) -> None:
    run = copied_line(trained, tmp_path)
    teacher = next(run.path.parent.glob("teacher-*"))
    collected = verify_inputs(run)
    kept = teacher / "out" / "checkpoints" / "step-000250"
    kept.mkdir(parents=True)
    (kept / "model.safetensors").write_bytes(b"kept on the host")
    assert verify_inputs(run) == collected
    lay_out(read_run(run.path), Rerun(tmp_path / "fresh"))
    record = json.loads(run.effective_file.read_bytes())
    record["inputs"]["teacher"]["sha256"] = tree_sha256(teacher / "out")  # as it was recorded with its checkpoints
    run.effective_file.write_text(json.dumps(record))
    lay_out(read_run(run.path), Rerun(tmp_path / "again"))
    (teacher / "out" / "model" / "config.json").write_bytes(b"{}")
    with pytest.raises(RefusedError, match=f"{teacher.name} is not what {run.run} read"):
        lay_out(read_run(run.path), Rerun(tmp_path / "spoilt"))


def test_an_input_that_lies_where_it_will_be_read_is_held_against_its_digest_too(
    trained: RunDir, tmp_path: Path
) -> None:
    teacher = next(trained.path.parent.glob("teacher-*"))
    fresh = tmp_path / "fresh"
    shutil.copytree(teacher, fresh / teacher.name)
    lay_out(read_run(trained.path), Rerun(fresh))
    assert not (fresh / teacher.name).is_symlink()
    shutil.rmtree(fresh / trained.run)
    (fresh / teacher.name / "out" / "teacher.json").write_bytes(b"{}")
    with pytest.raises(RefusedError, match=f"{teacher.name} is not what {trained.run} read"):
        lay_out(read_run(trained.path), Rerun(fresh))
    shutil.rmtree(fresh / teacher.name)
    (fresh / teacher.name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(RefusedError, match=f"{teacher.name} is not what {trained.run} read"):
        lay_out(read_run(trained.path), Rerun(fresh))


def test_an_input_without_a_digest_or_that_the_identity_does_not_name_is_refused(
    trained: RunDir, tmp_path: Path
) -> None:
    run = copied_line(trained, tmp_path)
    effective, launch = (json.loads(path.read_bytes()) for path in (run.effective_file, run.launch_file))
    for forged in ({}, {"teacher": None}, {"teacher": {"sha256": None}}, [], "x"):
        run.effective_file.write_text(json.dumps({**effective, "inputs": forged}))
        with pytest.raises(RefusedError, match="has no digest of what it read"):
            lay_out(read_run(run.path), Rerun(tmp_path / "fresh"))
    run.effective_file.write_text(json.dumps(effective))
    teacher = launch["resolved"]["teacher"]["run"]
    other = json.dumps({**launch, "resolved": {**launch["resolved"], "teacher": {"run": "teacher-" + "0" * 20}}})
    run.launch_file.write_text(other)
    with pytest.raises(RefusedError, match=f"names teacher-0.*, effective.json says it read {teacher}"):
        lay_out(read_run(run.path), Rerun(tmp_path / "fresh"))
    for named in ("../../x", f"../{teacher}", "data-" + "0" * 20, teacher + "\n", 7, None):
        for value in ({"run": named}, {"path": named}, named):
            resolved = {**launch["resolved"], "teacher": value}
            run.launch_file.write_text(json.dumps({**launch, "resolved": resolved}))
            with pytest.raises(RefusedError, match=r"'teacher'.* its identity names run:teacher-"):
                lay_out(read_run(run.path), Rerun(tmp_path / "fresh"))
    for shapeless in (None, [], "x", 7):
        run.launch_file.write_text(json.dumps({**launch, "resolved": shapeless}))
        with pytest.raises(RefusedError, match="does not say where its inputs lay"):
            lay_out(read_run(run.path), Rerun(tmp_path / "fresh"))
    assert not (tmp_path / "fresh").exists()


def test_an_input_may_be_another_run_that_means_the_same_and_is_the_one_that_was_read(
    trained: RunDir, tmp_path: Path
) -> None:
    run = copied_line(trained, tmp_path)
    launch, effective = (json.loads(path.read_bytes()) for path in (run.launch_file, run.effective_file))
    teacher, kin = launch["resolved"]["teacher"]["run"], "teacher-" + "0" * 20
    (run.path.parent / teacher).rename(run.path.parent / kin)
    launch["resolved"]["teacher"]["run"] = effective["inputs"]["teacher"]["run"] = kin
    run.launch_file.write_text(json.dumps(launch))
    run.effective_file.write_text(json.dumps(effective))
    lay_out(read_run(run.path), Rerun(tmp_path / "fresh"))
    assert (tmp_path / "fresh" / kin).is_symlink()


def test_nothing_is_written_into_what_was_recorded(trained: RunDir, tmp_path: Path) -> None:
    run = copied_line(trained, tmp_path)
    teacher = next(run.path.parent.glob("teacher-*"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for place, why in (
        (run.path, "which was recorded"),
        (teacher / "out", "which was recorded"),
        (tmp_path / "loop", "cannot be made"),
        (tmp_path / "file", "cannot be made"),
        (run.path.parent, "fresh folder"),
    ):
        with pytest.raises(RefusedError, match=why):
            lay_out(read_run(run.path), Rerun(place))


def test_other_code_and_what_cannot_run_again_are_refused(
    trained: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        digest = "0" * 64

    with monkeypatch.context() as patched:
        patched.setattr("latentforge.train.rerun.running_code", Other)
        with pytest.raises(RefusedError, match="this is 000000000000…"):
            reproduce(trained.path, Rerun(tmp_path))
    copied = tmp_path / "copied" / trained.run
    shutil.copytree(trained.path, copied)
    events = (copied / "events.jsonl").read_text().splitlines(keepends=True)
    (copied / "events.jsonl").write_text("".join(events[:-1]))
    with pytest.raises(RefusedError, match="did not come to its end"):
        reproduce(copied, Rerun(tmp_path))


def test_a_run_that_ends_without_its_products_is_a_failure_with_its_last_words(
    trained: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATENTFORGE_DEBUG", "0")
    with pytest.raises(FailedError, match="ended before it had its products when it ran again"):
        reproduce(trained.path, Rerun(tmp_path, python=Path("/bin/false")))
    asked = ["evidence", "reproduce", str(trained.path), "--python", "/bin/false"]
    assert main([*asked, "--to", str(tmp_path / "kept")]) == ExitCode.FAIL
    log = tmp_path / "kept" / trained.run / "launch.log"
    assert f"less {log}" in capsys.readouterr().err
    assert log.is_file()
    # Without --to the log is gone with its folder: then the command that keeps it is what follows.
    assert main(asked) == ExitCode.FAIL
    said = capsys.readouterr().err
    assert "launch.log" not in said
    assert f"latentforge evidence reproduce {trained.path} --to FOLDER" in said


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def asked_again(trained: RunDir, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own, whose temporary folder is ``folder``."""
    folder.mkdir()
    # What ignores a signal stays so in its children: a test run under nohup, or in a shell's background, does.
    command = ["env", "--default-signal=HUP,INT,TERM", sys.executable, "-m", "latentforge", "evidence", "reproduce"]
    command += [str(trained.path), *more]
    return subprocess.Popen(command, env={**os.environ, "TMPDIR": str(folder)}, stderr=subprocess.PIPE)


# One way leads from each of the three; two of them take a training more each, and are left to make soak.
OTHERS = [pytest.param(number, marks=pytest.mark.soak) for number in (signal.SIGHUP, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, *OTHERS])
def test_a_signal_ends_the_training_that_was_started(trained: RunDir, tmp_path: Path, number: signal.Signals) -> None:
    with asked_again(trained, tmp_path / "temporary") as process:
        wait_for(
            lambda: [*(tmp_path / "temporary").glob(f"*/{trained.run}/events.jsonl")] or process.poll() is not None
        )
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        process.send_signal(number)
        assert process.wait(60) == ExitCode.DETACHED
    assert not alive(int(children[0]))
    assert [*(tmp_path / "temporary").iterdir()] == []


def test_a_second_signal_kills_what_does_not_end_and_all_that_it_started(trained: RunDir, tmp_path: Path) -> None:
    stubborn, said = tmp_path / "stubborn", tmp_path / "pids"
    stubborn.write_text(f"#!/bin/sh\ntrap '' TERM\nsleep 600 &\necho $$ $! > {said}\nwait\n")
    stubborn.chmod(0o755)
    with asked_again(trained, tmp_path / "temporary", "--python", str(stubborn)) as process:
        wait_for(lambda: (said.is_file() and said.read_text().endswith("\n")) or process.poll() is not None)
        pids = [int(pid) for pid in said.read_text().split()]
        assert all(alive(pid) for pid in pids)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == ExitCode.DETACHED
    wait_for(lambda: not any(alive(pid) for pid in pids))
