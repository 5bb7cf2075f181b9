"""``latentforge bench train``: each second of a step belongs to a part, and a slow part shows where it is."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from latentforge.cli.bench import app
from latentforge.cli.bench_train import train
from latentforge.data.tokenizer import train_bpe
from latentforge.errors import RefusedError
from latentforge.spec.resolve import resolve_pipeline
from latentforge.targets.store import TargetStore
from latentforge.train.loop import Trainer
from latentforge.train.optimiser import MasterOptimiser
from latentforge.train.speed import measure as measuring
from latentforge.train.speed.asked import measurable
from latentforge.train.speed.material import Material, make_material
from latentforge.train.speed.measure import PARTS, Breakdown, matmul_peak, measure
from latentforge.train.speed.table import lines

SMALL = ["data.vocab_size=300", "data.sequence_length=16", "score.k=8", "distill.batch_size=4", "distill.device=cpu"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("material"), rows=12, length=16, vocab_size=300, k=8)


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PEAK_SIZE", {"cpu": 128})


def spec(*more: str) -> Any:
    return resolve_pipeline("tiny", env={}, overrides=[*SMALL, *more]).spec


def test_the_material_is_real_files_with_targets_for_every_row(material: Material) -> None:
    rows = material.shard.rows(np.arange(len(material.shard)))
    assert rows.shape == (12, 16)
    with TargetStore.open(material.store) as store:
        found = store.get_many(rows)
    assert len(found) == 12
    for one in found:
        assert all(len(set(ids)) == 8 for ids in one.ids.tolist())
        mass = np.exp(one.logprobs).sum(1) + np.exp(one.tails[1.0])
        assert np.allclose(mass, 1.0, atol=2e-2)


def test_the_parts_are_the_whole_step_and_the_kernel_is_a_part_of_the_forward_pass(material: Material) -> None:
    found = measure(spec("distill.micro_batch_size=2"), material, steps=3)
    assert set(found.parts) == set(PARTS)
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert min(found.parts[name] for name in ("forward", "backward", "optimiser")) > 0
    assert sum(found.parts.values()) == pytest.approx(found.step)
    assert 0 < found.kernel < found.step
    assert found.fetch > 0
    assert 0.0 <= found.hidden <= 1.0
    assert found.plain > 0
    assert found.utilisation > 0
    assert (found.sequences, found.micro_batch, found.length) == (4, 2, 16)


@pytest.mark.parametrize("slow", ["data and targets", "forward", "optimiser"])
def test_what_is_made_slow_is_the_part_that_says_so(
    slow: str, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowed(original: Any) -> Any:
        def waiting(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.2)
            return original(*args, **kwargs)

        return waiting

    if slow == "data and targets":
        monkeypatch.setattr(TargetStore, "get_many", slowed(TargetStore.get_many))
    elif slow == "forward":
        monkeypatch.setattr(measuring.Student, "forward", slowed(measuring.Student.forward))
    else:
        monkeypatch.setattr(MasterOptimiser, "step", slowed(MasterOptimiser.step))
    found = measure(spec("distill.prefetch=0"), material, steps=2)
    assert found.parts[slow] >= 0.2
    assert found.step >= 0.2
    if slow != "data and targets":  # which plain cross-entropy has none of
        assert found.plain >= 0.2


def test_no_target_is_fetched_while_a_step_of_plain_cross_entropy_is_timed(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fetched, beside = threading.Event(), list[int](), list[int]()
    get_many, step = TargetStore.get_many, Trainer.step

    def fetching(*args: Any) -> Any:
        for seconds in (0.1, 0.0):
            (beside if plain.is_set() else fetched).append(1)
            time.sleep(seconds)
        return get_many(*args)

    def stepping(self: Trainer, *args: Any) -> Any:
        if self.objective.kd_weight == 0:
            plain.set()
            time.sleep(0.2)
        try:
            return step(self, *args)
        finally:
            plain.clear()

    monkeypatch.setattr(TargetStore, "get_many", fetching)
    monkeypatch.setattr(Trainer, "step", stepping)
    measure(spec("distill.prefetch=2"), material, steps=3)
    assert fetched
    assert not beside


def test_the_first_product_is_not_counted_in_the_machine_s_own_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 4.0, 4.0, 6.0])
    monkeypatch.setattr(measuring._Clock, "now", lambda self: next(seconds))
    assert matmul_peak(torch.device("cpu"), torch.float32, rounds=2) == 2.0 * 128**3 / 2.0


KNOWN = Breakdown(
    device="cpu", threads=2, precision="fp32", parameters=100_000_000, vocab_size=151_936, sequences=8, length=129,
    micro_batch=2, k=64, prefetch=2, steps=5, step=2.0,
    parts={"data and targets": 0.1, "forward": 0.6, "backward": 1.0, "optimiser": 0.2, "rest": 0.1},
    kernel=0.1, fetch=0.05, hidden=0.9, plain=1.6, flops=1e11, peak=1e11,
)  # fmt: skip


def test_overhead_and_utilisation_are_the_quotients_that_they_are_called() -> None:
    assert KNOWN.overhead == pytest.approx(0.25)
    assert KNOWN.utilisation == pytest.approx(0.5)
    text = "\n".join(lines(KNOWN, "a machine"))
    assert "KD over plain cross-entropy: +25.0%" in text
    assert "model FLOPs utilisation: 50.0%" in text
    assert "backward                  1000.0    50.0%" in text
    assert "512 predictions/s" in text


@pytest.mark.parametrize(("limit", "code"), [(0.3, 0), (0.2, 1)])
def test_a_gate_below_the_measured_overhead_fails_the_command(
    limit: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "measure", lambda spec, material, *, steps, say: replace(KNOWN, steps=steps))
    assert train(recipe="tiny", overrides=SMALL, steps=1, max_overhead=limit, json=True) == code
    said = json.loads(capsys.readouterr().out)
    assert said["overhead"] == pytest.approx(0.25)
    assert said["steps"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-overhead", "nan"], "--max-overhead nan is not a share of a step"),
        (["--set", "distill.kd_weight=0"], "there is no KD to be measured"),
        (["--set", "through=autoencoder"], "through = 'autoencoder' trains no token-level student"),
        (["--set", "distill.temperature=2"], "another step than this is measured: distill.temperature = 2.0"),
        (
            ["--set", "distill.distributed=ddp", "--set", "distill.processes=2"],
            "another step than this is measured: distill.distributed = 'ddp', distill.processes = 2",
        ),
        (["--set", "distill.activation_checkpointing=true"], "distill.activation_checkpointing = True"),
        (["--set", "teacher.model=not/here"], "teacher.model = 'not/here' is no folder here"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(
        app, ["train", "tiny", "--steps", "1", *(f for one in SMALL for f in ("--set", one)), *arguments]
    )
    assert isinstance(done.exception, RefusedError)
    assert said in str(done.exception)


def test_the_vocabulary_is_that_of_the_teacher_s_tokenizer(tmp_path: Path) -> None:
    made = train_bpe(["the words of a corpus, again and again"] * 9, 270, tmp_path)
    assert measurable(spec("data.vocab_size=2048", f"teacher.model={tmp_path}")).data.vocab_size == made.vocab_size
    assert measurable(spec()).data.vocab_size == 300


def test_making_material_leaves_no_file_half_written(tmp_path: Path) -> None:
    made = make_material(tmp_path, rows=3, length=9, vocab_size=70_000, k=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["targets.sqlite", "train.bin"]
    assert made.shard.rows([2]).shape == (1, 9)
