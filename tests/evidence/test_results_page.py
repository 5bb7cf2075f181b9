"""docs/results.md says what its committed evidence says; run as a program, this file prints the rows of its tables."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from functools import cache
from pathlib import Path
from typing import Any

from latentforge.events import Event, read_events
from latentforge.evidence.verify import verify_evidence
from latentforge.verdicts import Outcome

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "evidence/stdlib-cpu"
PAGE = ROOT / "docs/results.md"

Values = dict[int, dict[str, float]]


def run_of(beginning: str) -> Path:
    (found,) = FOLDER.glob(f"{beginning}*/")
    return found


@cache
def events_of(run: Path) -> list[Event]:
    return read_events(run / "events.jsonl")


def predicate(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())["predicate"]
    return found


def heldout(run: Path, model: str) -> Values:
    """The held-out values of a model by step."""
    found: Values = {}
    for event in events_of(run):
        if event.kind == "metric" and event.fields.get("model") == model and event.fields["name"].startswith("val_"):
            found.setdefault(event.fields["step"], {})[event.fields["name"]] = event.fields["value"]
    return found


def speed(run: Path, model: str) -> float:
    steps = (event.fields for event in events_of(run) if event.kind == "step")
    return statistics.median(step["tokens_per_second"] for step in steps if step["model"] == model)


@cache
def rows() -> tuple[str, ...]:
    """The rows of the page's tables, from the manifests and events that are committed."""
    teacher, distill = run_of("teacher-"), run_of("distill-")
    latent, text = run_of("latent-f3be"), run_of("latent-4b23")
    found = []
    for name, run, model in (
        ("teacher", teacher, "teacher"),
        ("student", distill, "student"),
        ("its twin of text alone", distill, "twin"),
    ):
        said, last = predicate(run), max(heldout(run, model).items())
        kl = f"{last[1]['val_kl']:.4f}" if "val_kl" in last[1] else "0"
        seconds = said["timings"]["twin" if model == "twin" else "train"]
        found.append(
            f"| {name} | {last[0]} | {said['flops'][model] / 1e12:.2f} | {last[1]['val_loss']:.4f} | {kl} "
            f"| {seconds:.0f} s | {speed(run, model):,.0f} |"
        )
    trained = {name: heldout(distill, name) for name in ("student", "twin")}
    for step in sorted(trained["student"]):
        each = [f"{trained[name][step][value]:.4f}" for value in ("val_loss", "val_kl") for name in trained]
        found.append(f"| {step} | {' | '.join(each)} | {heldout(teacher, 'teacher')[step]['val_loss']:.4f} |")
    for name, run in (("with the teacher", latent), ("of text alone", text)):
        said, last = predicate(run), max(heldout(run, "latent").items())[1]
        found.append(
            f"| {name} | {said['flops']['latent'] / 1e12:.2f} | {last['val_text']:.4f} | {last['val_token_ce']:.4f} "
            f"| {said['timings']['train']:.0f} s | {speed(run, 'latent'):,.0f} |"
        )
    quality = json.loads((run_of("bench-") / "out/quality.json").read_text())
    for name, model in zip(("latent", "token-level"), quality["models"], strict=True):
        bits, brier = model["bits_per_byte"], model["brier_lm"]
        found.append(
            f"| {name} | {model['parameters']:,} | {model['inference_flops_per_token'] / 1e6:.2f} "
            f"| {bits['value']:.3f} ({bits['low']:.3f} to {bits['high']:.3f}) "
            f"| {brier['value']:.2f} ({brier['low']:.2f} to {brier['high']:.2f}) |"
        )
    return tuple(found)


def missing(page: str) -> list[str]:
    return [row for row in rows() if row not in page.splitlines()]


def test_each_row_of_the_page_is_what_the_evidence_says_and_an_edit_is_found() -> None:
    page = PAGE.read_text()
    assert missing(page) == []
    for row in rows():
        digit = max(at for at, letter in enumerate(row) if letter.isdigit())
        edited = row[:digit] + str((int(row[digit]) + 1) % 10) + row[digit + 1 :]
        assert missing(page.replace(row, edited)) == [row]


def test_the_evidence_verifies_as_the_page_quotes_it_and_an_altered_event_does_not(tmp_path: Path) -> None:
    found = verify_evidence(FOLDER)
    assert found.outcome is Outcome.PASS
    quoted = re.search(r"^verified, unsigned  (\d+) runs, (\d+) subjects", PAGE.read_text(), re.MULTILINE)
    assert quoted is not None
    runs = [folder for folder in FOLDER.iterdir() if folder.is_dir()]
    subjects = sum(len(json.loads((run / "manifest.json").read_text())["subject"]) for run in runs)
    assert [int(count) for count in quoted.groups()] == [len(runs), subjects]
    copy = shutil.copytree(run_of("distill-"), tmp_path / run_of("distill-").name)
    shutil.copy(FOLDER / "ledger.jsonl", tmp_path)
    assert verify_evidence(copy).outcome is Outcome.PASS
    events = (copy / "events.jsonl").read_text()
    value = next(event.fields["value"] for event in events_of(run_of("distill-")) if event.kind == "metric")
    (copy / "events.jsonl").write_text(events.replace(str(value), str(value / 2), 1))
    assert verify_evidence(copy).outcome is Outcome.FAIL


def test_no_weights_lie_beside_it_and_each_file_that_is_left_out_is_named() -> None:
    assert not [path for path in FOLDER.rglob("*") if path.suffix in (".safetensors", ".sqlite", ".bin")]
    for run in (folder for folder in FOLDER.iterdir() if folder.is_dir()):
        left = predicate(run)["not_collected"]
        assert left
        assert all(len(one["sha256"]) == 64 and not (run / one["path"]).exists() for one in left)


if __name__ == "__main__":
    print("\n".join(rows()))
