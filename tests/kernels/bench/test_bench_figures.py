"""Bytes and operations are counted right, and the table prints what the data say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from latentforge.cli import main
from latentforge.kernels.bench import floor
from latentforge.kernels.bench.contest import Contest, Line
from latentforge.kernels.bench.machine import STREAMS, Machine, Streams
from latentforge.kernels.bench.report import Report, Section, render
from latentforge.kernels.bench.run import code_identity, everything, remarks
from latentforge.verdicts import ExitCode

CPU = torch.device("cpu")
MACHINE = Machine("cpu", "a processor", "x86_64", 2, "2.13.0", "3.9.0", "a" * 64, "GNU 12", "avx512")


def section(*lines: Line, counted: floor.Floor | None = None, **changes: Any) -> Section:
    given: dict[str, Any] = {
        "op": "kd_loss",
        "title": "dense, forward KL and CE",
        "shape": {"N": 4, "V": 1000},
        "dtype": "bf16",
        "threads": 1,
        "temperature": 2.0,
        "floor": counted or floor.dense_kd(4, 1000, 2, ce=True),
        "lines": list(lines),
        "streams": {"read": 10e9, "scale": 20e9, "add": 24e9, "copy": 18e9},
    }
    return Section(**(given | changes))


def test_a_dense_pass_reads_both_logits_and_writes_one_gradient() -> None:
    counted = floor.dense_kd(3, 7, 2, ce=True)
    assert counted.bytes == 3 * 3 * 7 * 2
    assert counted.stream == "add"
    # Two softmaxes of 4, two for the loss, three for the gradient, three for the cross-entropy; per logit.
    assert counted.flops == (4 + 4 + 2 + 3 + 3) * 21
    assert floor.dense_kd(3, 7, 2, ce=False).flops == (4 + 4 + 2 + 3) * 21


def test_a_topk_pass_reads_and_writes_the_students_logits_whatever_k_is() -> None:
    counted = floor.topk_kd(3, 7, 4, ce=True)
    assert counted.bytes == 2 * 3 * 7 * 4
    assert counted.stream == "scale"
    assert counted.flops == (4 + 1 + 3) * 21


def test_decoding_reads_the_weight_once_whatever_the_rows() -> None:
    assert floor.decode(1, 11, 5, 2).bytes == floor.decode(16, 11, 5, 2).bytes == 11 * 5 * 2
    assert floor.decode(16, 11, 5, 2).flops == 2 * 16 * 11 * 5
    eight = floor.decode(1, 11, 5, 1)
    assert eight.bytes == 11 * 5 + 4 * 11  # and a scale a token
    assert eight.stream == "read"


def test_the_linear_loss_has_three_products_and_a_teachers_layer_a_fourth() -> None:
    n, v, h, ht = 3, 11, 5, 6
    alone = floor.linear_kd(n, v, h, 2)
    assert alone.flops == 6 * n * v * h
    assert alone.bytes == (3 * v * h + 3 * n * h) * 2
    beside = floor.linear_kd(n, v, h, 2, teacher_hidden=ht)
    assert beside.flops == 6 * n * v * h + 2 * n * v * ht
    assert beside.bytes == alone.bytes + (v * ht + n * ht) * 2


@pytest.mark.parametrize("name", list(STREAMS))
def test_a_stream_moves_what_is_counted_and_computes_what_its_name_says(name: str) -> None:
    streams = Streams(1 << 18, 2, CPU)
    assert streams.bytes(name) == STREAMS[name] * (1 << 18)
    a, b = streams._a, streams._b
    expected = {"read": a.clone(), "scale": a * 2, "add": a + b, "copy": b.clone()}[name]
    result = streams.action(name)()
    assert torch.equal(a, expected)
    if name == "read":
        assert result == int(a.view(torch.int64).sum()) % 2**64


def test_percent_and_ratios_are_those_of_the_medians() -> None:
    ours = Line("cpu (avx512)", "ours", [1.0, 9.0, 2.0])
    eager, compiled = Line("torch eager, 4 rows", "eager", [10.0]), Line("torch.compile, 8 rows", "compile", [6.0])
    found = section(ours, eager, compiled)
    assert ours.median == 2.0
    assert found.floor_ms == pytest.approx(24000 / 24e9 * 1e3)
    assert found.share(ours) == pytest.approx(0.001 / 2.0)
    assert found.ratio(ours, "eager") == 5.0
    assert found.ratio(ours, "compile") == 3.0
    assert found.ratio(ours, "peer") is None


def test_each_floor_is_counted_with_its_own_stream() -> None:
    sizes = {"dense": floor.dense_kd(4, 1000, 2, ce=True), "topk": floor.topk_kd(4, 1000, 2, ce=True)}
    sizes["decode"] = floor.decode(1, 1000, 8, 2)
    speeds = {name: section(counted=counted).bandwidth for name, counted in sizes.items()}
    assert speeds == {"dense": 24e9, "topk": 20e9, "decode": 10e9}


def test_a_section_with_bare_products_is_measured_against_them() -> None:
    products, ours = Line("bare bf16 products", "floor", [30.0]), Line("cpu", "ours", [40.0])
    found = section(products, ours, counted=floor.linear_kd(4, 1000, 8, 2))
    assert found.floor_ms == 30.0
    assert found.share(ours) == 0.75
    assert "floor = the bare products, 30.0 ms" in render(Report(MACHINE, [found], "now", "git:0"))


def test_the_table_prints_what_the_json_says() -> None:
    ours = Line("cpu (avx512)", "ours", [0.002], error=1.25e-3)
    eager = Line("torch eager, 4 rows", "eager", [0.013], error=1.3e-3, chunks={4: 0.013, 16: None})
    absent = Line("cuda", "ours", note="no CUDA device here")
    report = Report(MACHINE, [section(ours, eager, absent, rounding_error=1.2e-3)], "2026-11-21T10:00:00Z", "git:abc")
    data = json.loads(json.dumps(report.as_json()))
    entry, row = data["sections"][0], data["sections"][0]["lines"][0]
    assert row["median_ms"] == 0.002
    assert row["share_of_floor"] == pytest.approx(0.5)
    assert row["vs_eager"] == pytest.approx(6.5)
    assert row["vs_compile"] is None
    shown = render(report)
    assert f"{entry['floor']['formula']} = 0.0 MB" in shown
    assert "at a+=b 24.0 GB/s" in shown
    line = next(text for text in shown.splitlines() if text.startswith("  cpu (avx512)"))
    assert line.split()[2:] == ["0.00", "ms", "50", "%", "6.5x", "–", "1.25e-03"]
    assert "tried 4 rows 0 ms, 16 rows could not run" in shown
    assert "not run: cuda: no CUDA device here" in shown
    assert "rounding the exact gradient to bf16 alone: 1.20e-03" in shown


def test_a_contestant_that_cannot_run_is_named_with_its_error_and_the_others_go_on() -> None:
    turns: list[str] = []
    contest = Contest(CPU, rounds=3, tell=lambda what: None)

    def broken() -> None:
        raise RuntimeError("no compiler\nand more")

    bad, good = Line("bad", "compile"), Line("good", "ours")
    assert not contest.enter(bad, broken)
    assert contest.enter(good, lambda: turns.append("work"), prepare=lambda: turns.append("prepare"), judge=lambda: 0.5)
    contest.run()
    assert bad.note == "RuntimeError: no compiler"
    assert bad.milliseconds == []
    assert len(good.milliseconds) == 3
    assert good.error == 0.5
    assert turns == ["prepare", "work"] * 4  # the first turn is not counted


def test_of_several_chunks_the_fastest_counts_and_all_are_said() -> None:
    contest = Contest(CPU, rounds=2, tell=lambda what: None)
    line = Line("torch eager", "eager")

    def broken() -> None:
        raise ValueError("KeyError inside")

    busy = torch.ones(1 << 16)
    contest.enter_best(line, {4: lambda: [busy.sum() for _ in range(2000)], 16: lambda: None, 64: broken})
    contest.run()
    assert line.backend == "torch eager, 16 rows"
    assert list(line.chunks) == [4, 16, 64]
    assert line.chunks[64] is None
    assert line.note == "64 rows: ValueError: KeyError inside"
    assert len(line.milliseconds) == 2


def test_remarks_compare_k_with_k_and_int8_with_bf16() -> None:
    def topk(k: int, time: float) -> Section:
        return section(
            Line("cpu", "ours", [time]), title=f"top-k, k={k}, forward KL and CE", shape={"N": 4, "V": 1000, "k": k}
        )

    def decoded(dtype: str, time: float) -> Section:
        return section(Line("cpu", "ours", [time]), op="latent_decode", shape={"N": 1, "V": 9, "H": 3}, dtype=dtype)

    said = remarks([topk(16, 10.0), topk(128, 11.0), decoded("bf16", 9.0), decoded("int8", 5.0)])
    assert said == [
        "top-k over k, forward KL and CE, 1 thread: k=16 10.0 ms, k=128 11.0 ms; they differ by 10.0 %",
        "int8 weights beside bf16, 1 thread: 1.80x at 1 row",
    ]


def test_all_has_every_operator() -> None:
    from latentforge.kernels.bench import decode, kd, linear

    assert {type(work) for work in everything(quick=True, compiled=True)} == {kd.Work, linear.Work, decode.Work}


def test_a_folder_that_is_no_checkout_has_no_commit(tmp_path: Any) -> None:
    assert code_identity(tmp_path) == "unknown"


SMALL = ("--rows", "4", "--vocab", "300", "--quick", "--no-compile", "--threads", "1")


def test_bench_kd_measures_dense_and_every_k(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "bench", "kd", *SMALL, "--k", "5,7", "--device", "cpu", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [entry["shape"].get("k") for entry in data["sections"]] == [None, 5, 7]
    for entry in data["sections"]:
        ours = entry["lines"][0]
        assert ours["backend"].startswith("cpu (")
        assert ours["median_ms"] > 0
        assert ours["error"] < 0.01
    assert set(data["sections"][0]["streams"]) == set(STREAMS)


def test_bench_linear_and_decode_measure_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    linear = ["--rows", "8", "--vocab", "300", "--hidden", "16", "--k", "5"]
    assert main(["kernels", "bench", "linear", *linear, "--quick", "--no-compile", "--device", "cpu", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["sections"][0]
    roles = {line["role"] for line in entry["lines"] if line["median_ms"]}
    assert {"floor", "ours", "eager"} <= roles
    decode = ["--rows", "1,3", "--vocab", "300", "--hidden", "16", "--dtype", "bf16,int8", "--threads", "1"]
    assert main(["kernels", "bench", "decode", *decode, "--quick", "--no-compile", "--device", "cpu", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(entry["shape"]["N"], entry["dtype"]) for entry in data["sections"]] == [
        (1, "bf16"),
        (3, "bf16"),
        (1, "int8"),
        (3, "int8"),
    ]
    assert data["remarks"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["kd", "--dtype", "fp13"], "'fp13'"),
        (["kd", "--k", "8,many"], "'many'"),
        (["kd", "--k", "301", "--vocab", "300"], "k = 301"),
        (["kd", "--rows", "0"], "rows = 0"),
        (["kd", "--threads", "0", *SMALL[:4]], "threads = 0"),
        (["kd", "--threads", "two"], "'two'"),
        (["kd", "--direction", "sideways"], "'sideways'"),
        (["kd", "--temperature", "0"], "temperature = 0.0"),
        (["kd", "--rows", "900000000"], "GiB are free"),
        (["decode", "--dtype", "int4"], "'int4'"),
        (["linear", "--hidden", "0"], "hidden = 0"),
        (["--all", "--device", "abacus"], "'abacus'"),
        (["--all", "kd"], "'kd'"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_its_value(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", "bench", *arguments]) == ExitCode.REFUSED
    assert named in capsys.readouterr().err
