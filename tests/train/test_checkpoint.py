"""A checkpoint is whole, or it is refused."""

from __future__ import annotations

import json
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import latentforge.train.checkpoint as module
from latentforge.errors import FailedError, RefusedError
from latentforge.train.checkpoint import (
    Checkpoint,
    Position,
    Retention,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    snapshot,
)
from latentforge.train.engines.protocol import at_first
from latentforge.train.engines.world import World
from latentforge.train.generators import Generators

PLACE = Position("0" * 64, seed=7, batch_size=4)


def checkpoint(step: int, value: float = 1.0) -> Checkpoint:
    weights = {"a": torch.full((4, 3), value), "b": torch.zeros(5)}
    moments = {"a/exp_avg": torch.full((4, 3), value / 2), "a/step": torch.tensor(float(step))}
    return Checkpoint("student", step, weights, moments, Generators.now(), 1, PLACE)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    written = save_checkpoint(tmp_path, checkpoint(3, 0.1), start={})
    found = load_checkpoint(written.path)
    assert (found.model, found.step, found.threads, found.position) == ("student", 3, 1, PLACE)
    assert torch.equal(found.weights["a"], checkpoint(3, 0.1).weights["a"])
    assert torch.equal(found.moments["a/step"], torch.tensor(3.0))
    assert torch.equal(found.rng.cpu, torch.get_rng_state())
    assert found.rng.cuda is None
    assert load_file(written.path / "optimizer.safetensors").keys() == {"a/exp_avg", "a/step", "rng"}
    assert written.bytes >= written.expected_bytes == (12 + 5 + 12 + 1) * 4


def test_what_a_gpu_draws_from_is_kept_beside_the_cpus_and_put_back_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = [torch.arange(16, dtype=torch.uint8)]
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: drawn[-1])
    monkeypatch.setattr("torch.cuda.set_rng_state", drawn.append)
    ours = torch.get_rng_state()
    path = save_checkpoint(tmp_path, snapshot("student", 2, {"a": torch.ones(3)}.items(), (), PLACE), start={}).path
    torch.rand(3)
    found = load_checkpoint(path)
    assert found.moments == {}
    assert not found.rng.elsewhere
    found.rng.put_back()
    assert torch.equal(torch.get_rng_state(), ours)
    assert [one.tolist() for one in drawn] == [list(range(16))] * 2
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    found.rng.put_back()
    assert (found.rng.elsewhere, checkpoint(1).rng.elsewhere, len(drawn)) == (True, False, 2)


def test_unmoved_tensors_are_counted_and_named(tmp_path: Path) -> None:
    start = {name: module.tensor_sha256(value) for name, value in checkpoint(0, 0.0).weights.items()}
    written = save_checkpoint(tmp_path, checkpoint(1), start=start)
    assert (written.moved, written.trained, written.unmoved) == (1, 2, ("b",))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("fault", ["cut", "flipped", "gone"])
def test_a_damaged_file_is_refused_and_the_older_checkpoint_is_taken(tmp_path: Path, name: str, fault: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1), start={})
    save_checkpoint(tmp_path, checkpoint(2), start={})
    file = tmp_path / "step-000002" / name
    content = file.read_bytes()
    if fault == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:200] if fault == "cut" and len(content) > 200 else b"~" + content[1:-1])
    with pytest.raises(RefusedError, match="step-000002"):
        load_checkpoint(tmp_path / "step-000002")
    found, said = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1


def test_a_checkpoint_left_half_written_is_said_and_is_none(tmp_path: Path) -> None:
    (tmp_path / ".partial-step-000009").mkdir()
    assert newest_checkpoint(tmp_path) == (
        None,
        ["checkpoint .partial-step-000009 was left unfinished and is skipped"],
    )


def test_a_save_that_writes_something_else_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.save_file

    def wrong(tensors: dict[str, torch.Tensor], path: Path) -> None:
        real({name: value + 1 if value.is_floating_point() else value for name, value in tensors.items()}, path)

    monkeypatch.setattr(module, "save_file", wrong)
    with pytest.raises(FailedError, match="on disk is not what was in memory"):
        save_checkpoint(tmp_path, checkpoint(1), start={})


@pytest.mark.parametrize(
    ("retention", "spare", "left"),
    [
        (Retention(), None, [18, 20]),
        (Retention(newest=1), None, [20]),
        (Retention(newest=2, forever=6), None, [6, 12, 18, 20]),
        (Retention(newest=2), 9, [8, 18, 20]),
        (Retention(newest=30), None, list(range(2, 21, 2))),
    ],
)
def test_the_newest_the_nth_and_one_that_is_spared_are_kept_and_no_other(
    tmp_path: Path, retention: Retention, spare: int | None, left: list[int]
) -> None:
    for step in range(2, 21, 2):
        save_checkpoint(tmp_path, checkpoint(step), start={}, retention=retention, spare=spare)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:06d}" for step in left]


def test_a_snapshot_is_not_changed_by_the_steps_that_follow() -> None:
    weights, moments = {"a": torch.ones(3)}, {"a/exp_avg": torch.ones(3)}
    taken = snapshot("student", 1, weights.items(), moments.items(), PLACE)
    weights["a"] += 1
    moments["a/exp_avg"] += 1
    assert torch.equal(taken.weights["a"], torch.ones(3))
    assert torch.equal(taken.moments["a/exp_avg"], torch.ones(3))


def test_of_what_is_gathered_for_a_checkpoint_no_more_than_two_tensors_are_whole_at_a_time() -> None:
    whole: list[weakref.ref[torch.Tensor]] = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(5):
            # The one before is still in the hands of who asks for the next.
            assert sum(one() is not None for one in whole) <= 1
            tensor = torch.full((3,), float(number))
            whole.append(weakref.ref(tensor))
            yield str(number), tensor

    taken = snapshot("student", 1, gathered(), gathered(), PLACE)
    assert [float(one[0]) for one in taken.weights.values()] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert at_first(World(1, 2), gathered()) == {}  # the second process helps, and keeps none


def test_what_a_full_disk_refuses_is_a_failure_and_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, checkpoint(1), start={})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = snapshot("student", 2, [("a", torch.zeros(100_000))], [], PLACE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(FailedError, match="step-000002 could not be written") as failure:
            save_checkpoint(tmp_path, large, start={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "go --attempt next" in failure.value.next
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(1), start={}).path
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "schema": 1}))
    with pytest.raises(RefusedError, match="schema 1; 2 is read here"):
        load_checkpoint(path)


def test_a_checkpoint_smaller_than_its_tensors_is_a_failure_even_where_it_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = checkpoint(1)
    monkeypatch.setattr(module, "save_file", lambda tensors, path: Path(path).write_bytes(b"~"))
    with pytest.raises(FailedError, match=r"has \d+ bytes, its tensors alone need 2400"):
        save_checkpoint(tmp_path, Checkpoint(kept.model, 1, {"a": torch.zeros(600)}, {}, kept.rng, 1, PLACE), start={})
