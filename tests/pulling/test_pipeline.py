"""A pipeline that names a model by repo@commit: a step of its plan, done before its runs, and never half."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.planning.survey import survey
from dispatch.preflight.need import Models
from dispatch.preflight.run import Wanted, preflight
from dispatch.session import preview
from dispatch.transport.open import open_transport
from latentforge.errors import RefusedError
from latentforge.evidence.digests import tree_sha256
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]
COMMIT = "c0ffee" * 6 + "c0de"
REF = f"acme/tiny-lm@{COMMIT}"
FIELD = "teacher.model"


def state(laptop: Any) -> Path:
    return Path(laptop.home / "state" / "latentforge")


def test_a_preview_shows_the_pull_with_its_bytes_and_changes_nothing(
    hub: Any, laptop: Any, ask: Make, capsys: pytest.CaptureFixture[str], snapshot: Make
) -> None:
    before = snapshot(laptop.home)
    told = []
    for _ in range(2):
        assert preview(ask(None, f"{FIELD}={REF}"), laptop.places, as_json=False) is ExitCode.PASS
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert "  pull       run     acme/tiny-lm@c0ffeec0ffee  it is not there, 0.3 of 0.3 MB\n" in told[0]
    assert snapshot(laptop.home) == before
    assert not hub.asked_for("model.safetensors")


def test_go_pulls_first_and_gives_the_runs_the_models_place_and_a_second_go_asks_no_hub(
    hub: Any, laptop: Any, jobs: Any, ask: Make, session: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session().go(ask(None, f"{FIELD}={REF}")) is ExitCode.PASS
    folder = state(laptop) / "models" / f"acme--tiny-lm@{COMMIT}" / "files"
    runs = {path.name.partition("-")[0]: path for path in (state(laptop) / "runs").iterdir()}
    assert set(runs) == {"pull", "data", "score", "distill"}, "a teacher that is there is not trained"
    for kind, name in (("data", "tokenizer"), ("score", "teacher"), ("distill", "teacher")):
        launch = json.loads((runs[kind] / "launch.json").read_bytes())
        assert launch["resolved"][name] == {"path": str(folder), "sha256": tree_sha256(folder)}
    assert REF not in (runs["distill"] / "identity.json").read_text(), "a model is its content, not its name"
    hub.asked.clear()
    capsys.readouterr()
    assert session().go(ask(None, f"{FIELD}={REF}")) is ExitCode.PASS
    told = capsys.readouterr().out
    assert "pull       keep    acme/tiny-lm@c0ffeec0ffee  complete" in told
    assert "no changes. " in told
    assert hub.asked == []


@pytest.mark.parametrize("words", ["acme/tiny-lm@main", "acme/tiny-lm@v1"])
def test_a_branch_is_refused_in_a_pipeline_with_the_commit_that_it_is_now(hub: Any, ask: Make, words: str) -> None:
    with pytest.raises(RefusedError, match=f"is not pinned to a commit; it is commit {COMMIT} now") as refused:
        ask(None, f"{FIELD}={words}")
    assert refused.value.next == f"--set {FIELD}={REF}"


def test_a_branch_is_refused_where_no_hub_answers_too(
    ask: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("dispatch.pulling.onhost.web.time.sleep", lambda _: None)
    with pytest.raises(RefusedError, match="is not pinned to a commit") as refused:
        ask(None, f"{FIELD}=acme/tiny-lm@main")
    assert refused.value.next == "name its commit:  acme/tiny-lm@<40 hex digits>"


def test_a_model_that_cannot_serve_starts_no_run(hub: Any, jobs: Any, ask: Make, session: Make) -> None:
    """D4: the header of what was brought is opened on the host before anything is launched."""
    hub.files["model.safetensors"] = b"\xff" * 5000
    with pytest.raises(RefusedError, match=r"teacher\.model = .*model\.safetensors has 5000 bytes, its header alone"):
        session().go(ask(None, f"{FIELD}={REF}"))
    assert jobs.starts() == []


def test_a_teacher_without_a_tokenizer_is_refused_before_a_byte_of_it_moves(
    hub: Any, ask: Make, session: Make, laptop: Any
) -> None:
    del hub.files["tokenizer.json"]
    with pytest.raises(RefusedError, match=r"has no tokenizer\.json"):
        session().go(ask(None, f"{FIELD}={REF}"))
    assert not hub.asked_for("model.safetensors")
    assert not (state(laptop) / "runs").exists()


def test_a_model_that_was_touched_is_mended_before_the_next_run_takes_it(
    hub: Any, laptop: Any, jobs: Any, ask: Make, session: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    session().go(ask(None, f"{FIELD}={REF}"))
    folder = state(laptop) / "models" / f"acme--tiny-lm@{COMMIT}" / "files"
    (folder / "config.json").chmod(0o600)
    (folder / "config.json").write_bytes(b"{}")
    hub.asked.clear()
    capsys.readouterr()
    assert session().go(ask(None, f"{FIELD}={REF}", "distill.steps=70")) is ExitCode.PASS
    assert "config.json was changed since it was verified" in capsys.readouterr().out
    assert (folder / "config.json").read_bytes() == hub.files["config.json"]
    assert not hub.asked_for("model.safetensors"), "only what is wrong comes again"


def test_the_memory_of_a_model_is_judged_before_it_is_pulled_and_the_same_after(
    hub: Any, laptop: Any, jobs: Any, ask: Make, session: Make
) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {**json.loads(hub.files["config.json"]), **sizes, "intermediate_size": 512, "head_dim": 64}
    hub.files["config.json"] = json.dumps(config).encode()
    request = ask(None, f"{FIELD}={REF}")

    def shapes() -> Models:
        transport = open_transport(request.host, laptop.places, readonly=True)
        try:
            return Models.of(request, survey(transport, request, laptop.places)[1])
        finally:
            transport.close()

    before = shapes()
    assert before.troubles == ()
    assert before.teacher.shape is not None
    assert (before.teacher.shape.hidden, before.teacher.shape.layers) == (256, 2)
    assert before.teacher.bytes == len(hub.files["model.safetensors"])
    asked = Wanted(ask=lambda _host: request, only=frozenset({"memory"}))
    told = preflight(request.host, laptop.places, asked)
    assert told.facts is not None
    assert Models.of(request, told.facts) == before, "preflight --for asks the hub too"
    assert not hub.asked_for("model.safetensors")
    assert session().go(request) is ExitCode.PASS
    hub.asked.clear()
    assert shapes() == before
    told = preflight(request.host, laptop.places, asked)
    assert told.facts is not None
    assert Models.of(request, told.facts) == before
    assert hub.asked == []
