"""``latentforge kernels warmup`` says what it did, in words and as data, and its exit code is the verdict."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from conftest import stub

from latentforge.cli import main
from latentforge.kernels.guard import table as tables
from latentforge.kernels.guard.composite import OPS, composites
from latentforge.kernels.guard.key import key_of
from latentforge.kernels.guard.ladder import Choice
from latentforge.kernels.guard.machine import look
from latentforge.kernels.guard.records import Record, Records


@pytest.fixture
def only_stubs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``only_stubs("good", …)``: the table of this machine holds these alone, the records of the test's own folder."""

    def hold(*entries: str) -> None:
        ops = ("kd_loss", "linear_kd_loss", "latent_decode")
        found = [replace(stub(entry), dtype=dtype) for entry, dtype in zip(entries, ("fp32", "bf16"), strict=False)]
        assert all(variant.op in ops for variant in found)
        monkeypatch.setattr(tables, "table", lambda machine: found)

    return hold


def crashed(entry: str, attempts: int) -> Record:
    key = key_of(stub(entry), look()).digest
    fields = {"reason": "host_crash", "attempts": attempts, "finished": time.time()}
    return Record(stub(entry).name, key, "crashed", **fields)  # type: ignore[arg-type]


def test_a_machine_without_a_gpu_proves_what_it_can_and_says_what_it_cannot(
    only_stubs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    only_stubs("good")
    assert main(["kernels", "warmup"]) == 0
    said = capsys.readouterr().out
    assert "cpu/kd_loss.fp32.dense.forward  ok" in said
    assert "no CUDA device" in said
    assert "compiled code inspected, not loaded" in said
    assert said.rstrip().endswith("1 of 1 native, 0 fallbacks")


def test_an_unfit_machine_is_1_and_the_data_say_why(only_stubs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    only_stubs("kept_second")
    assert main(["kernels", "warmup", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["exit_code"] == 1
    (variant,) = said["variants"]
    assert (variant["state"], variant["reason"]) == ("failed", "mismatch_later_call")
    assert said["choices"][0]["backend"] is None


def test_a_crash_is_left_to_a_person(only_stubs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    only_stubs("good")
    records = Records()
    records.prepare()
    records.write(crashed("good", 2))
    # The only rung crashed: nothing is left to run on, which outranks the crash.
    assert main(["kernels", "warmup"]) == 1
    said = capsys.readouterr().out
    assert "not retried" in said
    assert "--accept-crash" in said
    assert main(["kernels", "warmup", "--again"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "kd_lost"], "'kd_lost'"),
        (["--timeout", "0"], "--timeout 0"),
        (["--again", "--accept-crash"], "one of the two"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], said: str, only_stubs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    only_stubs("good")
    assert main(["kernels", "warmup", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_info_counts_what_was_proven(only_stubs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "info"]) == 0
    assert "no records:  latentforge kernels warmup" in capsys.readouterr().out
    only_stubs("good")
    records = Records()
    records.prepare()
    records.write(replace(crashed("good", 0), state="ok", reason=None))
    records.write(replace(crashed("good", 0), key="0" * 20))
    records.path("1" * 20).write_text("{")
    assert main(["kernels", "info", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["warmup"]
    assert said["variants"] == {"cpu/kd_loss.fp32.dense.forward": "ok"}
    assert (said["older"], said["damaged"]) == (1, 1)


def test_info_counts_the_micro_step_of_the_chosen_kernels_as_of_now(capsys: pytest.CaptureFixture[str]) -> None:
    machine, records = look(), Records()
    records.prepare()
    everything = tables.table(machine)
    together = composites(machine, [Choice(op, "bf16", "cpu") for op in OPS])
    for variant in (*everything, *together):
        key = key_of(variant, machine).digest
        records.write(Record(variant.name, key, "ok", finished=time.time()))
    assert main(["kernels", "info", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["warmup"]
    assert said["variants"]["cpu/composite.bf16"] == "ok"
    assert (said["older"], said["damaged"]) == (0, 0)
