"""A pipeline through a latent student: which runs it has, what they mean, and what of it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentforge.errors import RefusedError
from latentforge.spec.capabilities import wanted_of
from latentforge.spec.latent import LatentSpec
from latentforge.spec.pipeline import PlannedRun, effective_pipeline, external_paths, pipeline_runs
from latentforge.spec.resolve import resolve_pipeline

FILE = """
seed = 7
through = "latent"
[data]
vocab_size = 320
chunk = 4
"""
CHAT = ["data.documents=chat", "teacher.backend=vllm-local", "teacher.model=/t"]
SAMPLED = ["latent.sample_weight=1.0"]
FULL = ["profile=full", "data.corpus=/c"]


def spec_file(tmp_path: Path, more: str = "") -> str:
    path = tmp_path / "p.toml"
    path.write_text(FILE + more)
    return str(path)


def planned(tmp_path: Path, *changes: str) -> dict[str, PlannedRun]:
    spec, _notes = effective_pipeline(resolve_pipeline(spec_file(tmp_path), env={}, overrides=changes).spec)
    digests = {one.path: "0" * 64 for one in external_paths(spec)}
    return {run.role: run for run in pipeline_runs(spec, digests=digests, code="c" * 64, lock="d" * 64)}


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        ([], ["data", "autoencoder", "latent"]),
        (["latent.token_kd_weight=1.0"], ["data", "teacher", "score", "autoencoder", "latent"]),
        (SAMPLED, ["data", "teacher", "continuations", "autoencoder", "latent"]),
        (
            [*SAMPLED, "latent.token_kd_weight=1.0", "latent.beside=true"],
            ["data", "teacher", "score", "continuations", "autoencoder", "distill", "latent"],
        ),
        (["latent.beside=true", "teacher.model=/t"], ["data", "score", "autoencoder", "distill", "latent"]),
        (["through=distill"], ["data", "teacher", "score", "distill"]),
        ([*FULL, "through=autoencoder"], ["data", "autoencoder"]),
        (FULL, ["data", "autoencoder", "latent-canary", "latent"]),
        (
            [*FULL, *SAMPLED, "latent.beside=true"],
            [
                "data",
                "teacher",
                "score",
                "continuations",
                "autoencoder",
                "latent-canary",
                "canary",
                "distill",
                "latent",
            ],
        ),
    ],
)
def test_there_is_a_run_for_what_a_signal_needs_and_no_other(
    tmp_path: Path, changes: list[str], roles: list[str]
) -> None:
    runs = planned(tmp_path, *changes)
    assert list(runs) == roles
    spec = resolve_pipeline(spec_file(tmp_path), env={}, overrides=changes).spec
    assert set(wanted_of(spec)["kinds"]) == {run.kind for run in runs.values()}


def test_up_to_its_codec_a_pipeline_has_no_more_runs_whatever_its_file_wants_of_the_student() -> None:
    whole = resolve_pipeline("smoke-latent", env={}).spec
    assert whole.benches
    short = resolve_pipeline("smoke-latent", env={}, overrides=["through=autoencoder"]).spec
    assert [one.role for one in pipeline_runs(short, digests={}, code="c" * 64, lock="d" * 64)] == [
        "data",
        "autoencoder",
    ]


def test_the_students_run_takes_what_its_signals_are_made_of(tmp_path: Path) -> None:
    runs = planned(tmp_path, *SAMPLED, "latent.token_kd_weight=1.0", "latent.beside=true")
    ids = {role: f"run:{run.run_id}" for role, run in runs.items()}
    assert runs["latent"].identity.inputs == {
        "data": ids["data"],
        "codec": ids["autoencoder"],
        "teacher": ids["teacher"],
        "targets": ids["score"],
        "continuations": ids["continuations"],
        "beside": ids["distill"],
    }
    assert runs["continuations"].identity.inputs == {"data": ids["data"], "teacher": ids["teacher"]}
    assert runs["continuations"].identity.spec["continuations"]["count"] == 8
    plain = planned(tmp_path)["latent"].identity
    assert plain.inputs.keys() == {"data", "codec"}


def test_a_full_student_takes_its_canary_which_learns_from_the_same_and_waits_for_no_student_beside_it(
    tmp_path: Path,
) -> None:
    kept = ["latent.validate_every=5", "latent.keep=best", "latent.warmup_steps=2000"]
    runs = planned(tmp_path, *FULL, *SAMPLED, "latent.token_kd_weight=1.0", "latent.beside=true", *kept)
    canary, long = runs["latent-canary"].identity, runs["latent"].identity
    assert long.inputs["canary"] == f"run:{canary.run_id}"
    assert canary.kind == "latent"
    learns = {name: where for name, where in long.inputs.items() if name not in ("canary", "beside")}
    assert (
        canary.inputs.keys() - {"stands_for"}
        == learns.keys()
        == {"data", "codec", "teacher", "targets"} | {"continuations"}
    )
    assert learns.items() <= canary.inputs.items()
    own = {"steps": 8, "checkpoint_every": 4, "warmup_steps": 4, "validate_every": None, "keep": "last"}
    own |= {"beside": False, "require": ["F-LATENT-CANARY-001", "F-LATENT-CAUSAL-001"]}
    assert canary.spec["latent"] == long.spec["latent"] | own
    assert LatentSpec.model_validate_json(json.dumps(canary.spec["latent"])).steps == 8
    assert "canary" not in planned(tmp_path)["latent"].identity.inputs


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        (["latent.steps=100000"], True),
        (["latent.checkpoint_every=7"], True),
        (["latent.validate_every=5", "latent.keep=best"], True),
        (["latent.beside=true"], True),
        (["latent.learning_rate=1e-4"], False),
        (["latent.warmup_steps=2000"], False),
        (["latent.text_weight=0.5"], False),
        (["latent.student.layers=3"], False),
        (["autoencoder.steps=601"], False),
        (["seed=8"], False),
    ],
)
def test_a_canary_stands_for_one_training_however_long_it_is_kept_and_measured(
    tmp_path: Path, changes: list[str], same: bool
) -> None:
    one, other = planned(tmp_path, *FULL), planned(tmp_path, *FULL, *changes)
    assert (one["latent-canary"].run_id == other["latent-canary"].run_id) is same
    assert one["latent"].run_id != other["latent"].run_id


def test_a_student_of_plain_text_needs_the_teachers_tokenizer_alone(tmp_path: Path) -> None:
    spec = resolve_pipeline(spec_file(tmp_path), env={}, overrides=["teacher.model=/t", "distill.student.init=/s"]).spec
    assert [(one.path, one.purpose) for one in external_paths(spec)] == [("/t", "tokenizer")]
    sampled = resolve_pipeline(spec_file(tmp_path), env={}, overrides=["teacher.model=/t", *SAMPLED]).spec
    assert [(one.path, one.purpose) for one in external_paths(sampled)] == [("/t", "model")]


def test_the_answers_of_a_chat_are_a_latent_students_text_and_rows(tmp_path: Path) -> None:
    chat = ["data.documents=chat", "teacher.backend=venice", "teacher.model=/t", "score.k=20"]
    runs = planned(tmp_path, *chat, "latent.token_kd_weight=1.0")
    assert list(runs) == ["data", "autoencoder", "latent"]
    assert runs["data"].identity.spec["teacher"]["backend"] == "venice"
    assert runs["latent"].identity.inputs["targets"] == f"run:{runs['data'].run_id}"
    assert list(planned(tmp_path, *chat, "through=autoencoder")) == ["data", "autoencoder"]


@pytest.mark.parametrize("through", ["latent", "autoencoder"])
def test_what_a_chat_cannot_give_a_token_level_student_is_nobodys_matter_where_none_is_trained(
    tmp_path: Path, through: str
) -> None:
    chat = ["data.documents=chat", "teacher.backend=vllm-local", "teacher.model=/t", f"through={through}"]
    compared = [*chat, "distill.targets=live", "distill.temperature=2", "distill.cross_tokenizer=true"]
    assert planned(tmp_path, *compared).keys() == planned(tmp_path, *chat).keys()
    with pytest.raises(RefusedError, match=r"distill.temperature = 2"):
        planned(tmp_path, *chat, "through=latent", "latent.beside=true", "distill.temperature=2")


@pytest.mark.parametrize("through", ["latent", "autoencoder", "distill"])
def test_epochs_are_steps_of_the_last_run_through_all_rows(tmp_path: Path, through: str) -> None:
    rows = ["data.train_sequences=33", f"through={through}"]
    resolved = resolve_pipeline(spec_file(tmp_path), env={"EPOCHS": "3", "BATCH_SIZE": "8"}, overrides=rows)
    assert getattr(resolved.spec, through).steps == 13  # 99 rows in batches of 8, which go on into the next epoch
    assert str(resolved.origins[f"{through}.steps"]) == "environment EPOCHS (3 times 33 rows, 8 a step)"
    for name, value, words in [
        ("EPOCHS", "0", "EPOCHS='0' is less than 1"),
        ("EPOCHS", "one", "EPOCHS='one' is not a whole number"),
        ("STEPS", "9", f"EPOCHS='3' and environment STEPS both say how long {through} is trained"),
    ]:
        with pytest.raises(RefusedError, match=words):
            resolve_pipeline(spec_file(tmp_path), env={"EPOCHS": "3", name: value}, overrides=rows)
    with pytest.raises(RefusedError, match=r"data\.train_sequences does not say how many"):
        resolve_pipeline(spec_file(tmp_path), env={"EPOCHS": "3"}, overrides=rows[1:])


def test_the_operators_names_set_the_last_run(tmp_path: Path) -> None:
    env = {"STEPS": "7", "BATCH_SIZE": "3", "LR": "1e-4", "T": "2", "ALPHA": "0.3"}
    resolved = resolve_pipeline(spec_file(tmp_path), env=env)
    latent = resolved.spec.latent
    assert (latent.steps, latent.batch_size, latent.learning_rate, latent.token_temperature) == (7, 3, 1e-4, 2.0)
    assert (latent.token_ce_weight, latent.token_kd_weight) == (0.3, 0.7)
    assert resolved.spec.distill.steps == 500
    with pytest.raises(RefusedError, match="STUDENT_INIT='/s' is of a token-level student"):
        resolve_pipeline(spec_file(tmp_path), env={"STUDENT_INIT": "/s"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.sequence_length=8", "data.chunk=8"], "a row of one chunk has none before it"),
        (["latent.text_weight=0"], "nothing would train the head that draws chunks"),
        (["latent.token_ce_weight=0"], "the token head would not be trained"),
        (["latent.student.token_layers=0"], "there is no token head"),
        (["latent.sample_weight=1", "continuations.temperatures=[0.5]"], r"T = 1, and continuations.temperatures"),
        (["latent.tempered_weight=1"], "hold none"),
        ([*SAMPLED, "latent.samples=100"], "shared out evenly among the 8 continuations .* set latent.samples = 96"),
        ([*SAMPLED, "latent.sample_continuations=9", "latent.samples=9"], "9 is more than continuations.count = 8"),
        ([*SAMPLED, "continuations.rows=9", "data.train_sequences=8"], "9 is more than data.train_sequences = 8"),
        (["continuations.temperatures=[1.0, 1.5]"], "continuations.temperatures"),
        (["latent.alpha=2"], "latent.alpha"),
        (["latent.student.heads=3"], "does not split into 3 heads"),
        (["latent.micro_batch_size=17"], "micro_batch_size 17 is larger than batch_size 16"),
        (["latent.require=['F-LATENT-KD-01']"], "did you mean 'F-LATENT-KD-001'"),
        (["latent.require=['F-DISTILL-SMOKE-001']"], r"'F-DISTILL-SMOKE-001', which a run of \[distill\] judges"),
        (["latent.require=['F-LATENT-AE-001']"], r"'F-LATENT-AE-001', which a run of \[autoencoder\] judges"),
        (["autoencoder.require=['F-LATENT-KD-001']"], r"'F-LATENT-KD-001', which a run of \[latent\] judges"),
        (["latent.text_weight=1e308", "latent.mse_weight=1e308"], "the sum of the weights is not finite"),
        (["continuations.temperatures=[1.0, 1e-5]"], "1e-05: input should be greater than or equal to 0.0001"),
        (["bench.quality_rows=4"], "bench.quality_rows = 4, and no bench run is made; set bench.measure = true"),
        (["bench.method=vote", "bench.temperature=0.25", "bench.draws=3"], "draws = 3 .* a chunk must come 4 times"),
        (["bench.method=exact", "bench.temperature=0.3", "bench.draws=2"], "draws = 2 .* a chunk must come 3 times"),
        (["bench.temperature=1e-5"], "temperature = 1e-05 is neither 0 nor at least 0.0001"),
        (["latent.beside=true", "distill.on_policy=0.5"], "what the student writes is not cut into chunks"),
        (["through=distill", "distill.cross_tokenizer=true", "teacher.model=/t"], "the padding of chunks is no text"),
        ([*CHAT, *SAMPLED], r"latent.sample_weight = 1 with data.documents = 'chat': .* without the prompt"),
        ([*CHAT, "latent.tempered_weight=2", "continuations.temperatures=[0.5]"], "latent.tempered_weight = 2 with"),
    ],
)
def test_what_cannot_be_trained_is_refused_when_it_is_read(tmp_path: Path, changes: list[str], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        resolve_pipeline(spec_file(tmp_path), env={}, overrides=changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["latent.token_kd_weight=1", "latent.token_temperature=2"], "token_temperature = 2 is not in score.temper"),
        ([*SAMPLED, "teacher.backend=store", "teacher.store=/s", "teacher.model=/t"], "can continue a raw text"),
        (
            ["latent.token_kd_weight=1", "teacher.backend=venice", "teacher.model=/t"],
            "latent.token_kd_weight = 1 needs a teacher that can score",
        ),
        ([*FULL, "latent.student.frozen=true"], "latent.student.frozen = true is a planted control"),
        ([*FULL, "latent.beside=true", "distill.student.frozen=true"], "distill.student.frozen = true"),
    ],
)
def test_what_the_teacher_cannot_give_is_refused_when_it_is_planned(
    tmp_path: Path, changes: list[str], words: str
) -> None:
    with pytest.raises(RefusedError, match=words):
        planned(tmp_path, *changes)
