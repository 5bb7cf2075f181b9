"""Each kind of run: what is shown of a bench, a codec, a latent student, a run that compiled or asked a server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentforge.events import EventLog
from latentforge.report.making import make_report
from latentforge.spec.identity import Kind, RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.verdicts import ExitCode, Outcome

from .chromium import Chromium
from .planted import distilled


def _run(runs: Path, kind: Kind, tell: Callable[[EventLog], None], out: dict[str, Any] | None = None) -> Path:
    identity = RunIdentity(kind, {"seed": 7, kind: {"steps": 20}}, {}, "a" * 64, "b" * 64)
    run = RunDir.create(runs, identity, LaunchRecord(identity.run_id, "c" * 64, {}))
    with open(run.log_file, "w") as text, EventLog(run.events_file, run.run, text=text) as log:
        tell(log)
        log.end(ExitCode.PASS)
    run.out.mkdir()
    for name, value in (out or {}).items():
        (run.out / name).write_text(json.dumps(value))
    return run.path


def _page(folder: Path, to: Path, browser: Chromium) -> str:
    make_report([str(folder)], to)
    for width in (390, 1280):
        seen = browser.show(to, width=width)
        assert (seen.console, seen.asked, seen.overflow) == ([], [], [])
    return to.read_text()


def _contestant(name: str, speed: float, bits: float | None) -> dict[str, Any]:
    score = None if bits is None else {"bits_per_byte": {"value": bits, "low": bits - 0.2, "high": bits + 0.2}}
    speeds = {"median": speed, "least": speed - 9, "greatest": speed + 9}
    return {"name": name, "role": "token", "tokens_per_second": speeds, "flops_per_token": 1.2e6, "quality": score}


def test_a_bench_shows_speeds_and_quality_against_compute(browser: Chromium, runs: Path, tmp_path: Path) -> None:
    def tell(log: EventLog) -> None:
        for model, value in (("latent, K = 4", 700.0), ("token-level", 350.0)):
            log.metric("tokens_per_second", value, step=0, split="bench", model=model)

    bench = {"contestants": [_contestant("latent, K = 4", 700.0, 2.9), _contestant("token-level", 350.0, None)]}
    page = _page(_run(runs, "bench", tell, {"bench.json": bench}), tmp_path / "report.html", browser)
    assert "“latent, K = 4” wrote 700.0 tokens/s, 2.00 times “token-level” (350.0)." in page
    assert "Bits a byte against compute" in page
    assert "700 tokens/s" in page
    assert page.count('class="whisker ') == 1


def test_a_codec_shows_what_came_back_for_each_level_of_noise(browser: Chromium, runs: Path, tmp_path: Path) -> None:
    def tell(log: EventLog) -> None:
        for step, share in ((0, 0.01), (20, 0.99)):
            of = {"step": step, "split": "heldout", "model": "autoencoder"}
            log.metric("val_loss", 6.0 - step / 4, **of)
            log.emit("metric", name="token_accuracy", value=share, **of)
            for noise in (0.1, 0.5):
                log.emit("metric", name="noisy_token_accuracy", value=share - noise / 10, noise=noise, **of)

    page = _page(_run(runs, "autoencoder", tell), tmp_path / "report.html", browser)
    assert "99.00 % of the held-out tokens came back" in page
    assert "noisy token accuracy at noise 0.5" in page


def test_a_latent_students_loss_and_terms_are_shown(browser: Chromium, runs: Path, tmp_path: Path) -> None:
    def tell(log: EventLog) -> None:
        for step in range(1, 21):
            log.step(step, 20, model="latent", loss=40.0 / step, learning_rate=1e-3, rows=480, tokens_per_second=9e3)
        for step in (0, 20):
            for name in ("val_loss", "val_text", "val_token_ce"):
                log.metric(name, 40.0 - step, step=step, split="heldout", model="latent")

    page = _page(_run(runs, "latent", tell), tmp_path / "report.html", browser)
    assert "the latent student lowered its held-out loss from 40.00 to 20.00 (as its loss is measured)" in page
    assert "Held-out terms of the loss" in page


def test_compiles_and_what_a_server_was_asked_are_shown(browser: Chromium, runs: Path, tmp_path: Path) -> None:
    def tell(log: EventLog) -> None:
        log.compile("inductor", count=3, what=["kd_loss", "<b>fused</b>"], step=7, model="student")
        counted = {"teacher_requests": 412, "teacher_retries": 3, "teacher_hit_rate": 0.25}
        log.emit("metric", name="teacher", value=412, step=20, split="score", model="teacher", **counted)

    with_phase = _run(runs, "score", lambda log: (log.emit("phase", name="ask", state="begin"), tell(log))[-1])
    page = _page(with_phase, tmp_path / "report.html", browser)
    assert "3 compiles after set-up" in page
    assert "inductor: 3 by step 7: kd_loss, &lt;b&gt;fused&lt;/b&gt;" in page
    assert "<dt>requests</dt><dd>412</dd>" in page
    assert "not ended" in page


def test_compiles_that_no_event_names_are_those_of_all_steps_together(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs)
    events = re.sub(r'("step": [34], .*?)"compiles": 0', r'\1"compiles": 2', (run / "events.jsonl").read_text())
    (run / "events.jsonl").write_text(events)
    make_report([str(run)], tmp_path / "report.html")
    assert "8 compiles after set-up, 120 steps" in (tmp_path / "report.html").read_text()


def test_terms_that_have_no_colour_left_are_said_not_to_be_drawn(runs: Path, tmp_path: Path) -> None:
    def tell(log: EventLog) -> None:
        for step in (0, 20):
            for term in "abcdefgh":
                log.metric(f"val_{term}", 40.0 - step, step=step, split="heldout", model="latent")

    make_report([str(_run(runs, "latent", tell))], tmp_path / "report.html")
    assert "2 more are not drawn, val_g the first of them" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("lost", [0, 100])
def test_rows_without_a_teacher_have_a_chart(runs: Path, tmp_path: Path, lost: int) -> None:
    run = distilled(runs)
    events = (run / "events.jsonl").read_text().replace('"rows": 1016, ', f'"rows": 1016, "kd_rows": {1016 - lost}, ')
    (run / "events.jsonl").write_text(events)
    make_report([str(run)], tmp_path / "report.html")
    assert ("<b>Teacher coverage</b>" in (tmp_path / "report.html").read_text()) == (lost > 0)


def test_a_long_name_of_a_falsifier_fits_a_phone(browser: Chromium, runs: Path, tmp_path: Path) -> None:
    verdicts = [(f"F-{'A' * 90}-{number:03}", Outcome.FAIL, "y" * 500) for number in range(3)]
    _page(distilled(runs, verdicts=verdicts, code=ExitCode.FAIL), tmp_path / "report.html", browser)


def test_a_phase_at_the_very_end_is_not_cut_off(browser: Chromium, runs: Path, tmp_path: Path) -> None:
    run = distilled(runs)
    lines = (run / "events.jsonl").read_text().splitlines()
    late = json.loads(lines[-1])
    late |= {"t": late["t"] + 1000.0}
    save = [late | {"kind": "phase", "name": "save", "state": state, "seconds": 0.001} for state in ("begin", "end")]
    (run / "events.jsonl").write_text("\n".join([*lines[:-1], *map(json.dumps, save), json.dumps(late)]) + "\n")
    _page(run, tmp_path / "report.html", browser)
