"""Going on after any end: what was the best, which checkpoint of which model, what there is to go back to."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from latentforge.errors import FailedError, LatentForgeError, RefusedError
from latentforge.events import EventLog, read_events
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.train import checkpoint as checkpoints
from latentforge.train import keeping
from latentforge.train.best import Best
from latentforge.train.checkpoint import Position, newest_checkpoint, save_checkpoint, snapshot, steps_in
from latentforge.train.course import Course, Watch
from latentforge.train.hosts.mirror import read_by
from latentforge.train.keeping import Keeper
from latentforge.train.products import start_digests
from latentforge.train.rehearsal import small_trainer
from latentforge.train.resume import Earlier, open_predecessor
from latentforge.train.stopping import Interrupted
from latentforge.verdicts import ExitCode

STEPS = 20
ROWS = Position("0" * 64, seed=7, batch_size=4)
MODELS = {"student": "", "twin": "twin"}
SKIP = {"on_bad_step": "skip", "divergence_factor": 4.0, "divergence_steps": 4}
Attempt = Callable[..., RunDir]
Kept = Callable[..., Any]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """A run folder; each further one is the attempt after the one before it."""
    before: list[RunDir] = []

    def make(*, floor: int = 0, **asked: Any) -> RunDir:
        identity = RunIdentity("distill", {"endurance": asked}, {}, "a" * 64, "b" * 64, attempt=len(before) + 1)
        launch = LaunchRecord(
            identity.run_id,
            "c" * 64,
            {},
            predecessor=before[-1].run if before else None,
            endurance={"disk_floor_mib": floor},
        )
        before.append(RunDir.create(tmp_path, identity, launch))
        return before[-1]

    return make


@contextmanager
def kept(run: RunDir, *, model: str = "student", every: int = 5) -> Iterator[Keeper]:
    """The keeper of a tiny model's checkpoints, and what its run says."""
    trainer = small_trainer()
    start = start_digests(trainer.optimiser)
    trained, optimiser = trainer.student.model, trainer.optimiser
    with ExitStack() as opened:
        log = opened.enter_context(EventLog(run.events_file, run.run, text=io.StringIO()))
        below = MODELS[model]
        yield opened.enter_context(Keeper(run, log, trained, optimiser, model, start, STEPS, every, ROWS, below))


def left(run: RunDir, model: str = "student") -> Earlier:
    folder = run.checkpoints / MODELS[model]
    step = steps_in(folder)[-1]
    return Earlier(run.run, step, folder / f"step-{step:06d}", read_events(run.events_file))


def measured(keeper: Keeper, best: Best, step: int, loss: float) -> None:
    keeper.log.metric("val_loss", loss, step=step, split="heldout", model=keeper.model)
    best.offer(step, loss)


def best_of(keeper: Keeper) -> Best:
    return Best(keeper, wanted=True, every=1)


def test_the_best_loss_of_a_step_made_twice_is_the_one_that_stands(attempt: Attempt) -> None:
    run = attempt()
    with kept(run) as keeper:
        best = best_of(keeper)
        keeper.keep(0)
        measured(keeper, best, 2, 5.0)
        best.go_back(keeper.go_back(0) or 0)
        measured(keeper, best, 2, 3.0)
        keeper.keep(5)
    with kept(run) as keeper:
        again = best_of(keeper)
        again.carry(left(run))
        assert (again.step, again.loss) == (2, 3.0)


def test_a_best_step_is_taken_over_as_often_as_the_run_is_begun_again(attempt: Attempt) -> None:
    first, second = attempt(), attempt()
    with kept(first) as keeper:
        best = best_of(keeper)
        for step, loss in ((1, 4.0), (3, 2.0)):
            measured(keeper, best, step, loss)
        keeper.keep(5)
    for _ in range(2):  # it dies before its first checkpoint, and is begun again
        with kept(second) as keeper:
            again = best_of(keeper)
            again.carry(left(first))
            assert (again.step, again.loss) == (3, 2.0)
            assert steps_in(second.checkpoints / "best") == [3]
            measured(keeper, again, 4, 1.0)


def test_a_run_begun_again_goes_back_to_any_best_step_that_it_kept(attempt: Attempt) -> None:
    run = attempt()
    with kept(run) as keeper:
        best = best_of(keeper)
        for step, loss in ((1, 4.0), (3, 2.0)):
            measured(keeper, best, step, loss)
        keeper.keep(5)
    with kept(run) as keeper:
        again = best_of(keeper)
        again.carry(left(run))
        again.go_back(2)
        assert (again.step, again.loss) == (1, 4.0)


def test_each_model_goes_on_from_the_last_attempt_that_has_a_checkpoint_of_it(attempt: Attempt) -> None:
    first, second = attempt(), attempt()
    for model, step in (("student", 6), ("twin", 5)):
        with kept(first, model=model) as keeper:
            keeper.keep(step)
    with kept(second) as keeper:
        assert keeper.resume(left(first)) == 6
    with EventLog(second.events_file, second.run, text=io.StringIO()) as log:
        found = open_predecessor(second, log, MODELS)
    assert {model: (one.run, one.step) for model, one in found.items()} == {
        "student": (second.run, 6),
        "twin": (first.run, 5),
    }


def test_another_host_is_lent_the_last_checkpoint_of_each_model_from_whatever_attempt(attempt: Attempt) -> None:
    first, second, third = attempt(), attempt(), attempt()
    for run, model, step in ((first, "student", 6), (first, "twin", 5), (second, "student", 10)):
        with kept(run, model=model) as keeper:
            keeper.keep(step)
            keeper.keep(step, "best")
    third.checkpoints.mkdir(parents=True)
    lent = [one.path.split("/out/checkpoints/") for one in read_by(third).files]
    assert {(run, Path(path).parent.as_posix()) for run, *rest in lent for path in rest} == {
        (f"runs/{second.run}", "step-000010"),
        (f"runs/{second.run}", "best/step-000010"),
        (f"runs/{first.run}", "twin/step-000005"),
        (f"runs/{first.run}", "twin/best/step-000005"),
    }
    assert {run for run, *rest in lent if not rest} >= {f"runs/{one.run}/launch.json" for one in (first, second)}


def test_an_attempt_that_goes_on_while_the_loss_diverges_goes_back_to_what_the_one_before_it_kept(
    attempt: Attempt,
) -> None:
    first, second = attempt(**SKIP), attempt(**SKIP)
    losses = [1.0] * 11 + [9.0] * 9  # from step 12 on
    with kept(first) as keeper:
        course = Course(keeper, best_of(keeper), first=0, earlier=None)
        for number in range(13):
            keeper.log.emit("step", step=number + 1, steps=STEPS, loss=losses[number], model="student")
            assert not course.went_back(number, losses[number])
            keeper.after(number + 1, None)
        keeper.keep(13)
    with kept(second) as keeper:
        assert keeper.resume(left(first)) == 13
        course = Course(keeper, best_of(keeper), first=13, earlier=left(first))
        assert [course.went_back(number, losses[number]) for number in (13, 14)] == [False, True]
        assert keeper.kept == 10


def test_the_median_is_of_as_many_losses_as_it_waits_for() -> None:
    watch = Watch(4.0, 150)
    told = [watch.feed(step, 1.0 if step < 150 else 1000.0) for step in range(300)]
    assert told == [False] * 299 + [True]


def test_what_a_run_goes_on_from_is_not_held_on_to(attempt: Attempt) -> None:
    first, second = attempt(), attempt()
    with kept(first) as keeper:
        keeper.keep(5)
    earlier = left(first)
    with kept(second) as keeper:
        keeper.resume(earlier)
        assert first.run not in Path("/proc/self/maps").read_text()


def test_a_signal_while_the_last_checkpoint_is_written_stops_the_run(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "stop_requested", lambda: "SIGTERM")
    told = "SIGTERM after the last step of the student; checkpoint written"
    with pytest.raises(Interrupted, match=told), kept(run := attempt()) as keeper:
        keeper.after(STEPS, None)
    assert steps_in(run.checkpoints) == [STEPS]


# --- the disk -------------------------------------------------------------------------------------------------------


def room(monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        found = list(real(path))
        found[4] = (mib << 20) // found[1]
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", statvfs)


def test_room_is_not_judged_while_a_checkpoint_is_written_after_which_older_ones_go(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(attempt(floor=10)) as keeper:
        room(monkeypatch, 9)
        keeper._writing = keeping._Writing(lambda: None)
        monkeypatch.setattr(keeper._writing, "is_alive", lambda: True)
        keeper.after(6, None)
        keeper.settle()
        with pytest.raises(LatentForgeError, match="9 MiB are left on the run's disk"):
            keeper.after(7, None)


def test_a_disk_too_full_for_a_second_model_ends_a_run_that_can_go_on(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attempt(floor=10)
    with kept(run) as keeper:
        keeper.keep(5)
    room(monkeypatch, 9)
    with pytest.raises(LatentForgeError, match="a checkpoint of the twin") as refused, kept(run, model="twin"):
        pass
    assert refused.value.code is ExitCode.UNKNOWN
    assert "--attempt next" in (refused.value.next or "")
    with pytest.raises(LatentForgeError, match="a checkpoint of the student") as refused, kept(attempt(floor=10)):
        pass
    assert refused.value.code is RefusedError.default_code


def test_parameters_that_lie_on_other_processes_count_in_what_a_checkpoint_takes(attempt: Attempt) -> None:
    with kept(attempt()) as keeper:
        whole = keeper._size
        for one in keeper.trained.parameters():
            one.ds_numel = one.numel()  # type: ignore[attr-defined]
            one.data = torch.empty(0)
        keeper.__post_init__()
        assert keeper._size == whole > 0


@pytest.mark.parametrize("call", ["mkdir", "replace"])
def test_a_disk_that_refuses_a_folder_or_a_name_is_a_failure_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((checkpoints.os, "replace") if call == "replace" else (Path, "mkdir")), full)
    taken = snapshot("student", 1, [("w", torch.ones(2))], [], ROWS)
    with pytest.raises(FailedError, match=r"could not be written: .*No space left"):
        save_checkpoint(tmp_path, taken, start={})


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.rmtree

    def cut_short(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).is_dir():
            (Path(path) / "state.json").unlink()
            raise OSError(5, "killed here")

    for step in (1, 2, 3):
        if step == 3:
            monkeypatch.setattr(shutil, "rmtree", cut_short)
        taken = snapshot("student", step, [("w", torch.full((2,), float(step)))], [], ROWS)
        if step < 3:
            save_checkpoint(tmp_path, taken, start={})
    with pytest.raises(FailedError, match="step-000001 could not be removed"):
        save_checkpoint(tmp_path, taken, start={})
    monkeypatch.setattr(shutil, "rmtree", real)
    assert steps_in(tmp_path) == [2, 3]
    found, said = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, said) == (3, [])
    checkpoints.drop_after(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_a_checkpoint_that_outlived_a_kill_in_the_middle_of_its_removal_goes_when_the_run_ends(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attempt()
    with monkeypatch.context() as killed:
        killed.setattr(checkpoints, "retain", lambda *_, **__: None)
        killed.setattr(keeping, "retain", lambda *_, **__: None)
        with kept(run) as keeper:
            for step in (5, 10, 15, 20):
                keeper.keep(step)
    with kept(run) as keeper:
        assert keeper.resume(left(run)) == 20
    assert steps_in(run.checkpoints) == [15, 20]
