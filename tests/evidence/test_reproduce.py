"""A run made again from its identity and its inputs: the same bits, or how far from them and why."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentforge.cli import main
from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.reading import read_run
from latentforge.evidence.tensors import tensor_digests
from latentforge.spec.run import RunDir
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.likeness import Likeness, compare_products
from latentforge.train.rehearsal import tiny_spec
from latentforge.train.reproduce import Reproduction, Rerun, reproduce
from latentforge.verdicts import ExitCode, Outcome

WEIGHTS = "out/student/model.safetensors"


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
    assert found.setting == ()
    assert found.likeness == Likeness(found.likeness.compared, (), 0.0, 0.0, None)
    assert found.likeness.compared > 5
    assert found.outcome is Outcome.PASS
    assert found.lines() == [f"bit-equal  {found.likeness.compared} tensors and shards of {trained.run}"]
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
    likeness = compare_products(read_run(trained.path), read_run(copied))
    assert len(likeness.different) == 1
    assert likeness.different[0].startswith(f"{WEIGHTS} ")
    assert 0 < likeness.distance < 1e-4
    same = Reproduction(trained.run, copied, likeness, (), 1e-2)
    assert same.outcome is Outcome.FAIL
    assert any(likeness.different[0] in line for line in same.lines())
    other = Reproduction(trained.run, copied, likeness, ("device threads: 1 then, 2 now",), 1e-2)
    assert other.outcome is Outcome.PASS
    assert other.lines()[0].startswith("within tolerance")
    assert other.lines()[-1] == "not as the first time: device threads: 1 then, 2 now"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({name: value * 1.1 for name, value in tensors.items()}),
        lambda tensors: tensors.pop(sorted(tensors)[0]),
        lambda tensors: tensors.update({sorted(tensors)[0]: tensors[sorted(tensors)[0]] * float("nan")}),
        lambda tensors: tensors.update({name: value.double() for name, value in tensors.items()}),
    ],
    ids=["scaled", "missing", "nan", "other type"],
)
def test_other_weights_fail_on_any_setting(
    trained: RunDir, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    likeness = compare_products(read_run(trained.path), read_run(altered(trained, tmp_path, change)))
    assert Reproduction(trained.run, tmp_path, likeness, ("threads",), 1e-2).outcome is Outcome.FAIL


def test_the_same_weights_with_other_results_fail_on_any_setting(trained: RunDir, tmp_path: Path) -> None:
    copied = altered(trained, tmp_path, last_bit)
    lines = (copied / "events.jsonl").read_text().splitlines(keepends=True)
    at = max(number for number, line in enumerate(lines) if '"val_kl"' in line)
    event = json.loads(lines[at])
    lines[at] = json.dumps({**event, "value": event["value"] * 2}) + "\n"
    (copied / "events.jsonl").write_text("".join(lines))
    likeness = compare_products(read_run(trained.path), read_run(copied))
    assert likeness.metrics == pytest.approx(0.5)
    assert "val_kl" in str(likeness.metric)
    assert Reproduction(trained.run, tmp_path, likeness, ("threads",), 1e-2).outcome is Outcome.FAIL


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


def test_other_code_and_what_cannot_run_again_are_refused(
    trained: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        digest = "0" * 64

    with monkeypatch.context() as patched:
        patched.setattr("latentforge.train.reproduce.running_code", Other)
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
    with pytest.raises(FailedError, match="ended with None when it ran again"):
        reproduce(trained.path, Rerun(tmp_path, python=Path("/bin/false")))
    assert main(["evidence", "reproduce", str(trained.path), "--python", "/bin/false"]) == ExitCode.FAIL
    assert "launch.log" in capsys.readouterr().err
