"""The page's text: what a run says stands in it as text, whatever it is, and what is missing is said to be."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from latentforge.cli import main
from latentforge.errors import RefusedError
from latentforge.evidence.checks import recorded_run
from latentforge.report.making import make_report
from latentforge.verdicts import Outcome

from .chromium import Chromium
from .planted import SAMPLES, distilled

HOSTILE = (
    '"></pre></style><script>document.title="ran"</script><img src=x onerror=alert(1)>{{ 7 * 7 }}\u202egnp.x\x1b[2J'
)


def _page(*folders: Path, to: Path, **options: bool) -> str:
    made = make_report([str(folder) for folder in folders], to, **options)
    assert made.page == to
    return to.read_text()


def test_markup_in_prompts_verdicts_warnings_and_settings_stays_text(
    browser: Chromium, runs: Path, tmp_path: Path
) -> None:
    run = distilled(
        runs,
        samples=[{"prompt": HOSTILE, "text": HOSTILE, HOSTILE: HOSTILE}],
        verdicts=[("F-BATCH-ROWS-001", Outcome.FAIL, HOSTILE.replace("\x1b", ""))],
        warnings=(HOSTILE,),
    )
    effective = json.loads((run / "effective.json").read_text())
    effective["effective"]["distill"][HOSTILE] = HOSTILE
    effective["versions"][HOSTILE] = HOSTILE
    (run / "effective.json").write_text(json.dumps(effective))
    text = (run / "events.jsonl").read_text().replace('"model": "twin"', f'"model": {json.dumps(HOSTILE)}')
    (run / "events.jsonl").write_text(text)

    page = _page(run, to=tmp_path / "report.html")
    assert "<script" not in page
    assert "<img" not in page
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "⟨U+202E⟩" in page
    assert "{{ 7 * 7 }}" in page
    for width in (390, 1280):
        seen = browser.show(tmp_path / "report.html", width=width)
        assert (seen.console, seen.asked, seen.overflow) == ([], [], [])
    assert "ran" not in browser.ask("Runtime.evaluate", expression="document.title")["result"]["value"]


def test_values_that_are_not_finite_are_gaps_that_are_counted(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs, loss_at=lambda step: math.nan if 20 <= step < 23 else math.inf if step == 30 else 4.0)
    page = _page(run, to=tmp_path / "report.html")
    assert "student: 4 of 60 values are not finite, the first at step 20" in page
    assert not re.search(r'd="[^"]*(nan|inf)', page)


def test_a_run_of_nothing_but_nan_still_has_a_report(runs: Path, tmp_path: Path) -> None:
    page = _page(distilled(runs, loss_at=lambda step: math.nan), to=tmp_path / "report.html")
    assert "student: 60 of 60 values are not finite" in page


@pytest.mark.parametrize(
    "lacking", ["events.jsonl", "effective.json", "identity.json", "launch.json", "out/samples.json"]
)
def test_a_folder_that_lacks_a_file_has_a_report(runs: Path, tmp_path: Path, lacking: str) -> None:
    run = distilled(runs)
    (run / lacking).unlink()
    page = _page(run, to=tmp_path / "report.html")
    assert run.name in page
    assert ("nothing recorded" in page) == (lacking == "events.jsonl")
    assert ("What was in force was not recorded" in page) == (lacking == "effective.json")


def test_samples_that_cannot_be_read_are_named(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs)
    (run / "out" / "samples.json").write_text("[{")
    assert "out/samples.json cannot be read" in _page(run, to=tmp_path / "report.html")
    (run / "out" / "samples.json").write_text("null")
    assert "out/samples.json holds nothing but null" in _page(run, to=tmp_path / "report.html")
    (run / "out" / "samples.json").write_text('{"prompt": 1}')
    assert "out/samples.json holds no list of samples" in _page(run, to=tmp_path / "report.html")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_place_of_a_file_of_samples_is_named(
    runs: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    run = distilled(runs, steps=3)
    (run / "out" / "samples.json").unlink()
    for name in ("samples.json", "bench.json"):
        make(run / "out" / name)
    told: list[str] = []

    def report() -> None:
        told.append(_page(run, to=tmp_path / "report.html", verify=False))

    reporting = threading.Thread(target=report, daemon=True)
    reporting.start()
    reporting.join(60)
    assert told, "the report waits for a writer"
    assert "out/samples.json is no file" in told[0]
    assert "out/bench.json is no file" in told[0]


def test_the_evidence_is_verified_for_the_report_and_a_flipped_byte_is_named(runs: Path, tmp_path: Path) -> None:
    run = recorded_run(runs)
    assert "verified, unsigned" in _page(run, to=tmp_path / "report.html")
    assert "not verified for this report" in _page(run, to=tmp_path / "report.html", verify=False)
    weights = run / "out" / "student" / "model.safetensors"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    page = _page(run, to=tmp_path / "report.html")
    assert "FAILED" in page
    assert "out/student/model.safetensors" in page


def test_a_setting_that_was_not_in_force_is_shown(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs)
    effective = (run / "effective.json").read_text()
    whole = json.loads(effective)
    whole["effective"]["distill"]["learning_rate"] = 2e-3
    (run / "effective.json").write_text(json.dumps(whole))
    assert "0.001 asked, 0.002 in force" in _page(run, to=tmp_path / "report.html")


def test_several_runs_are_compared_and_only_what_differs_is_listed(runs: Path, tmp_path: Path) -> None:
    first, second = distilled(runs), distilled(runs, rate=2e-3, loss_at=lambda step: 6.0)
    page = _page(first, second, to=tmp_path / "report.html")
    assert "2 runs, 2 pass; they differ in learning_rate." in page
    assert "Quality against compute" in page
    assert re.findall(r'<dl class="field"><dt>(.*?)</dt>', page) == ["learning_rate"]


def test_a_setting_that_a_run_does_not_have_is_told_apart_from_one_that_says_so(runs: Path, tmp_path: Path) -> None:
    first, second = distilled(runs), distilled(runs, rate=2e-3)
    effective = json.loads((first / "effective.json").read_text())
    effective["effective"]["distill"]["words"] = "not there"
    (first / "effective.json").write_text(json.dumps(effective))
    page = _page(first, second, to=tmp_path / "report.html")
    told = re.findall(r'<dd( class="absent")?><i class="dot run\d"></i>not there</dd>', page)
    assert told == ["", ' class="absent"']


def test_held_out_values_of_other_rows_are_not_compared(runs: Path, tmp_path: Path) -> None:
    first, second = distilled(runs), distilled(runs, rate=2e-3)
    events = (second / "events.jsonl").read_text()
    (second / "events.jsonl").write_text(events.replace('"rows_sha256": "3d', '"rows_sha256": "77'))
    page = _page(first, second, to=tmp_path / "report.html")
    assert "held-out values compare only within a group" in page
    assert "Quality against compute" not in page


def test_a_report_is_not_written_into_a_run_nor_over_something_else(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs)
    with pytest.raises(RefusedError, match="is a run's folder"):
        make_report([str(run)], run / "report.html")
    with pytest.raises(RefusedError, match="is a run's folder"):
        make_report([str(run)], tmp_path / "report.html", tensorboard=run / "out")
    other = tmp_path / "thesis.html"
    other.write_text("<!doctype html><p>years of work")
    with pytest.raises(RefusedError, match="is no report"):
        make_report([str(run)], other)
    assert other.read_text() == "<!doctype html><p>years of work"
    with pytest.raises(RefusedError, match="named twice"):
        make_report([str(run), str(run)], tmp_path / "report.html")
    with pytest.raises(RefusedError, match=r"an \.html file"):
        make_report([str(run)], tmp_path / "report.pdf")


def test_the_command_writes_the_page_plots_and_events_and_says_where(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = distilled(runs)
    monkeypatch.chdir(tmp_path)
    assert main(["report", run.name[:12], "--tensorboard", "tb"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"reports/{run.name}.html"
    assert told[1] == f"reports/{run.name}-plots/  8 plots"
    assert Path(told[2]).is_file()
    pictures = sorted((tmp_path / "reports" / f"{run.name}-plots").iterdir())
    assert len(pictures) == 8
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert main(["report", run.name, "--terminal", "--to", "x.html"]) == 2


def test_samples_stand_side_by_side_in_a_fixed_order(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs, samples=[dict(reversed(SAMPLES[0].items()))])
    page = _page(run, to=tmp_path / "report.html")
    sides = re.findall(r"<div><b>(.*?)</b><pre>", page)
    assert sides == ["the text itself", "teacher", "student", "twin"]


def test_a_sample_of_nothing_but_spaces_and_line_ends_is_seen(runs: Path, tmp_path: Path) -> None:
    page = _page(
        distilled(runs, samples=[{"prompt": "a", "student": "\n \n", "twin": ""}]), to=tmp_path / "report.html"
    )
    assert "<pre>⏎␣⏎</pre>" in page
    assert "<pre>(nothing)</pre>" in page


def test_a_page_says_how_many_of_a_long_list_it_leaves_out(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs, warnings=tuple(f"warning {n}" for n in range(401)), samples=SAMPLES * 41)
    effective = json.loads((run / "effective.json").read_text())
    effective["effective"] |= {f"field{n}": n for n in range(1000)}
    (run / "effective.json").write_text(json.dumps(effective))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    saved = next(event for event in events if event["kind"] == "checkpoint")
    compiled = saved | {"kind": "compile", "compiler": "c", "count": 1, "what": ["a"]}
    phases = [{**saved, "kind": "phase", "name": "p", "state": "begin"} for _ in range(400)]
    long = [*events[:-1], *[saved] * 401, *[compiled] * 403, *phases, events[-1]]
    (run / "events.jsonl").write_text("\n".join(map(json.dumps, long)) + "\n")
    page = _page(run, to=tmp_path / "report.html")
    left = re.findall(r"(\d+) more ([a-z ]+) are left out here", page)
    assert left == [
        ("3", "phases"), ("3", "lines of compiles"), ("2", "checkpoints"), ("1", "warnings"), ("1", "samples"),
        ("605", "settings"),
    ]  # fmt: skip


def test_the_file_of_a_report_of_several_runs_is_that_of_no_other_runs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two, three = (distilled(runs, steps=3, rate=rate) for rate in (1e-3, 2e-3, 3e-3))
    made = {make_report(list(map(str, chosen)), None).page for chosen in ([one], [one, two], [one, three], [two, one])}
    assert len(made) == 4
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == sorted(path.name for path in made if path)


def test_plots_replace_nothing_but_plots(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs, steps=3)
    for _ in range(2):
        assert make_report([str(run)], tmp_path / "report.html", plots=True).plots
    picture = tmp_path / "report-plots" / "loss.png"
    picture.write_bytes(b"\x89PNG of somebody")
    (tmp_path / "report.html").unlink()
    with pytest.raises(RefusedError, match=r"loss\.png: is there already and is no plot"):
        make_report([str(run)], tmp_path / "report.html", plots=True)
    assert picture.read_bytes() == b"\x89PNG of somebody"
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("place", ["file/report.html", "n" * 300 + ".html", "round/report.html", "", "here.html"])
def test_a_place_where_nothing_can_be_written_is_refused_and_nothing_is_left(
    runs: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = distilled(runs, steps=3)
    (tmp_path / "file").write_text("of somebody")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "here.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    to = str(tmp_path / place) if place else ""
    assert main(["report", str(run), "--to", to]) == 2
    assert "--to" in (told := capsys.readouterr().err) or "cannot be written" in told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", ["--tensorboard", "--plots"])
def test_a_folder_of_plots_or_events_that_cannot_be_made_is_refused(
    runs: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = distilled(runs, steps=3)
    (tmp_path / "report-plots").write_text("of somebody")
    asked = [option, str(tmp_path / "report-plots"), "--no-plots"] if option == "--tensorboard" else [option]
    assert main(["report", str(run), "--to", str(tmp_path / "report.html"), *asked]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_page_that_cannot_be_finished_leaves_the_old_one_and_no_part_of_itself(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = distilled(runs, steps=3)
    before = _page(run, to=tmp_path / "report.html")

    def full(self: Path, text: str, **_: str) -> None:
        self.write_bytes(b"the beginning")
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RefusedError, match="No space left on device"):
        make_report([str(run)], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == before


def test_held_out_values_of_rows_that_nobody_knows_are_not_compared(runs: Path, tmp_path: Path) -> None:
    first, second, third = (distilled(runs, rate=rate) for rate in (1e-3, 2e-3, 3e-3))
    for run in (first, second):
        events = (run / "events.jsonl").read_text()
        (run / "events.jsonl").write_text(re.sub(r', "rows_sha256": "[^"]*"', "", events))
    for runs_ in ((first, second), (first, second, third)):
        page = _page(*runs_, to=tmp_path / "report.html")
        assert f"the held-out rows of {first.name[:12]}, {second.name[:12]} are not known" in page
        assert "Quality against compute" not in page
