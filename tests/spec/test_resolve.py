"""A pipeline's values come from flag, environment, file or default, in that order; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.spec.recipe import read_recipe, recipe_names
from latentforge.spec.resolve import resolve_pipeline, resolve_teacher


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text("[distill]\nsteps = 11\nbatch_size = 5\nlearning_rate = 0.5\n")
    resolved = resolve_pipeline(str(file), env={"STEPS": "22", "BATCH_SIZE": "6"}, overrides=["distill.steps=33"])
    distill = resolved.spec.distill
    assert (distill.steps, distill.batch_size, distill.learning_rate, distill.temperature) == (33, 6, 0.5, 1.0)
    origins = {field: str(origin) for field, _, origin in resolved.values()}
    assert origins["distill.steps"] == "flag"
    assert origins["distill.batch_size"] == "environment BATCH_SIZE"
    assert origins["distill.learning_rate"] == "file"
    assert origins["distill.temperature"] == "default"


def test_alpha_sets_both_weights_exactly() -> None:
    distill = resolve_pipeline("smoke", env={"ALPHA": "0.3"}).spec.distill
    assert (distill.ce_weight, distill.kd_weight) == (0.3, 0.7)


@given(alpha=st.decimals(0, 1, places=4, allow_nan=False))
def test_alpha_in_range_gives_weights_that_sum_to_one_in_decimal(alpha: object) -> None:
    distill = resolve_pipeline("tiny", env={"ALPHA": str(alpha)}).spec.distill
    assert f"{distill.ce_weight + distill.kd_weight:.12f}" == "1.000000000000"


def test_the_operators_names_set_the_final_student_run_only() -> None:
    env = {"STEPS": "9", "BATCH_SIZE": "3", "LR": "1.5e-5", "T": "2"}
    plain, steered = resolve_pipeline("smoke").spec, resolve_pipeline("smoke", env=env).spec
    assert (steered.data, steered.teacher, steered.score) == (plain.data, plain.teacher, plain.score)
    assert (steered.distill.steps, steered.distill.learning_rate, steered.distill.temperature) == (9, 1.5e-5, 2.0)


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"STEPS": "5OO"}, ["STEPS='5OO'", "whole number", "environment variable", "distill.steps"]),
        ({"STEPS": "5.5"}, ["STEPS='5.5'", "distill.steps"]),
        ({"STEPS": "0"}, ["distill.steps", "0", "STEPS"]),
        ({"STEPS": ""}, ["STEPS=''"]),
        ({"STEPS": "1\nkd_weight = 9"}, ["STEPS="]),
        ({"LR": "fast"}, ["LR='fast'", "not a number"]),
        ({"LR": "-1"}, ["distill.learning_rate", "-1"]),
        ({"T": "0"}, ["distill.temperature", "0"]),
        ({"T": "-2"}, ["distill.temperature", "-2"]),
        ({"T": "nan"}, ["distill.temperature"]),
        ({"ALPHA": "1.5"}, ["ALPHA='1.5'", "between 0 and 1"]),
        ({"ALPHA": "half"}, ["ALPHA='half'", "not a number"]),
        ({"BATCH_SIZE": "1e3"}, ["BATCH_SIZE='1e3'"]),
        ({"TEACHER_BACKEND": "venis"}, ["TEACHER_BACKEND='venis'"]),
    ],
)
def test_a_bad_environment_value_is_named_and_never_replaced_by_a_default(
    env: dict[str, str], named: list[str]
) -> None:
    with pytest.raises(RefusedError) as refused:
        resolve_pipeline("smoke", env=env)
    assert all(part in str(refused.value) for part in named), str(refused.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("distill.stepz=3", ["distill.stepz", "distill.steps"]),
        ("distil.steps=3", ["distil", "distill"]),
        ("distill.kd_weight=-1", ["distill.kd_weight", "-1"]),
        ("score.k=99999", ["99999", "2048"]),
        ("distill.targets=stored", ["stored", "'store'"]),
        ("distill.student=3", ["table"]),
        ("distill.steps", ["FIELD=VALUE"]),
        ("distill.student.heads=3", ["64", "3"]),
        ("distill.require=['smoke']", ["smoke", "falsifier", "known: F-DISTILL-SMOKE-001"]),
        ("distill.require=['F-DISTILL-SMOKE-003']", ["F-DISTILL-SMOKE-003", "did you mean 'F-DISTILL-SMOKE-00"]),
    ],
)
def test_a_bad_flag_is_named_with_the_nearest_right_one(override: str, named: list[str]) -> None:
    with pytest.raises(RefusedError) as refused:
        resolve_pipeline("smoke", overrides=[override])
    assert all(part in str(refused.value) for part in named), str(refused.value)


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(RefusedError, match="nothing would be trained"):
        resolve_pipeline("smoke", overrides=["distill.ce_weight=0", "distill.kd_weight=0"])


def test_values_that_do_not_fit_together_are_traced_to_the_flag_or_variable_that_set_them() -> None:
    with pytest.raises(RefusedError, match=r"k = 4096 is larger than the vocabulary \(2048 tokens\) \(flag\)"):
        resolve_pipeline("smoke", overrides=["score.k=4096"])
    with pytest.raises(RefusedError, match=r"micro_batch_size 64 .* batch_size 4 \(environment BATCH_SIZE, flag\)"):
        resolve_pipeline("smoke", env={"BATCH_SIZE": "4"}, overrides=["distill.micro_batch_size=64"])


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"\xff\xfe", "is not UTF-8: byte 0xff at offset 0"), (None, "is not a file"), (b"a = [", "is not TOML")],
)
def test_a_pipeline_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None, named: str) -> None:
    file = tmp_path / "mine.toml"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(RefusedError, match=named):
        resolve_pipeline(str(file))


def test_an_unknown_key_in_a_file_names_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[distill]\nlearning_rat = 1e-3\n")
    with pytest.raises(RefusedError, match=r"distill\.learning_rat.*mine\.toml.*distill\.learning_rate"):
        resolve_pipeline(str(file))


def test_a_wrong_type_in_a_file_is_refused_not_converted(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[distill]\nsteps = "500"\n')
    with pytest.raises(RefusedError, match=r"distill\.steps = '500'"):
        resolve_pipeline(str(file))


def test_a_misspelt_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(RefusedError) as refused:
        resolve_pipeline("smok")
    assert "smoke" in str(refused.value.next)


def test_every_recipe_that_comes_with_the_package_is_valid() -> None:
    assert {"smoke", "tiny"} <= set(recipe_names())
    for name in recipe_names():
        given = [f"{field}=/somewhere" for field in read_recipe(name).needs]
        assert resolve_pipeline(name, overrides=given).spec.distill.steps > 0


def test_a_file_may_leave_values_to_whoever_launches_it_and_is_refused_without_them(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('needs = ["teacher.model", "data.corpus", "distill.steps"]\n[distill]\nbatch_size = 3\n')
    with pytest.raises(
        RefusedError, match=r"mine\.toml needs teacher\.model and data\.corpus and distill\.steps"
    ) as found:
        resolve_pipeline(str(file))
    assert found.value.next == f"TEACHER_REPO=… STEPS=… latentforge dispatch go {file} --set data.corpus=…"
    some = resolve_pipeline(str(file), env={"TEACHER_REPO": "/t", "STEPS": "5"}, overrides=["data.corpus=/c"]).spec
    assert (some.teacher.model, some.data.corpus, some.distill.steps, some.distill.batch_size) == ("/t", "/c", 5, 3)
    with pytest.raises(RefusedError, match=r"needs data\.corpus:"):
        resolve_pipeline(str(file), env={"TEACHER_REPO": "/t", "STEPS": "5"})


def test_what_a_file_needs_is_no_part_of_what_it_means(tmp_path: Path) -> None:
    plain, needing = tmp_path / "plain.toml", tmp_path / "needing.toml"
    plain.write_text("[distill]\nsteps = 5\n")
    needing.write_text('needs = ["distill.steps"]\n[distill]\nsteps = 5\n')
    assert resolve_pipeline(str(plain)).spec == resolve_pipeline(str(needing)).spec


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ('"teacher.model"', "needs = 'teacher.model' is not a list of fields"),
        ("[3]", r"needs = \[3\] is not a list of fields"),
        ('["teacher.modle"]', r"unknown key 'teacher\.modle' .*did you mean 'teacher\.model'"),
        ('["teacher"]', "needs names 'teacher', which is a table"),
        ('["teacher.model.x"]', "teacher.model has no fields"),
    ],
)
def test_needs_that_name_no_field_are_refused(needs: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"needs = {needs}\n")
    with pytest.raises(RefusedError, match=said):
        resolve_pipeline(str(file), env={"TEACHER_REPO": "/t"})


def test_the_teachers_section_alone_is_refused_without_what_it_needs_and_asks_for_nothing_else() -> None:
    with pytest.raises(RefusedError, match=r"gb10-latent-4 needs teacher\.model:"):
        resolve_teacher("gb10-latent-4", env={})
    section, _origins = resolve_teacher("gb10-latent-4", env={"TEACHER_REPO": "/t"})
    assert (section.model, section.backend) == ("/t", "vllm-local")
