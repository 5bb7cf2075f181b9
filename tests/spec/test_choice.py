"""Who answers is chosen by flag, variable, .env, file or default, in that order; what was chosen is said, and why."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.cli import main
from latentforge.errors import RefusedError
from latentforge.spec.choice import ALL_NAMES, BACKENDS, VENICE_URL
from latentforge.spec.dotenv import Environment, parse_dotenv, read_dotenv
from latentforge.spec.pipeline import effective_pipeline, pipeline_runs
from latentforge.spec.resolve import ResolvedPipeline, resolve_pipeline

KEY = "sk-planted-0123456789"
SERVER = "http://127.0.0.1:8000/v1"
FOLDER = "teacher.model=/models/t"


def chosen(env: dict[str, str], *overrides: str, dotenv: dict[str, str] | None = None) -> ResolvedPipeline:
    return resolve_pipeline("smoke", env=Environment(env, dotenv or {}), overrides=[FOLDER, *overrides])


def origin(resolved: ResolvedPipeline, field: str) -> str:
    return {name: str(one) for name, _, one in resolved.values()}[field]


def test_the_names_that_users_know_set_the_fields_of_their_backend() -> None:
    venice = chosen({"TEACHER_BACKEND": "venice", "VENICE_API_KEY": KEY, "VENICE_MODEL": "qwen3-4b"}).spec.teacher
    assert (venice.backend, venice.url, venice.served_model) == ("venice", VENICE_URL, "qwen3-4b")
    assert venice.api_key_env == "VENICE_API_KEY"
    own = {"VENICE_BASE_URL": "https://example.test/v1", "TEACHER_BACKEND": "venice"}
    assert chosen(own).spec.teacher.url == "https://example.test/v1"
    remote = {"TEACHER_BACKEND": "vllm-remote", "VLLM_REMOTE_URL": SERVER, "VLLM_REMOTE_API_KEY": KEY}
    assert chosen(remote).spec.teacher.model_dump(include={"backend", "url", "api_key_env"}) == {
        "backend": "vllm-remote", "url": SERVER, "api_key_env": "VLLM_REMOTE_API_KEY",
    }  # fmt: skip
    engine = {"VLLM_LOCAL_MODEL": "/models/big", "VLLM_QUANTIZATION": "gptq", "VLLM_MAX_MODEL_LEN": "4096"}
    for backend in ("vllm-local", "vllm-local-inproc"):
        env = {"TEACHER_BACKEND": backend, "VLLM_GPU_MEMORY_UTIL": "0.7", **engine}
        env["LATENTFORGE_VLLM_ENVIRONMENT"] = "/envs/vllm"
        local = resolve_pipeline("smoke", env=env).spec.teacher
        assert (local.backend, local.model, local.quantization) == (backend, "/models/big", "gptq")
        assert (local.max_model_len, local.gpu_memory_utilization) == (4096, 0.7)
        assert local.environment == "/envs/vllm", "a run does not inherit the variable"


def test_the_names_of_other_backends_are_left_alone() -> None:
    env = {"VLLM_REMOTE_URL": SERVER, "VENICE_API_KEY": KEY, "VLLM_MAX_MODEL_LEN": "nonsense"}
    teacher = chosen({"TEACHER_BACKEND": "hf", **env}).spec.teacher
    assert (teacher.backend, teacher.url, teacher.api_key_env) == ("hf", None, None)


def test_flag_beats_variable_beats_dotenv_beats_file(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text(f'[teacher]\nmodel = "/m"\nbackend = "vllm-remote"\nurl = "{SERVER}"\n')

    def url(env: dict[str, str], dotenv: dict[str, str], *flags: str) -> tuple[str | None, str]:
        resolved = resolve_pipeline(str(file), env=Environment(env, dotenv), overrides=flags)
        return resolved.spec.teacher.url, origin(resolved, "teacher.url")

    env, dotenv = {"VLLM_REMOTE_URL": "http://b/v1"}, {"VLLM_REMOTE_URL": "http://c/v1"}
    assert url({}, {}) == (SERVER, "file")
    assert url({}, dotenv) == ("http://c/v1", ".env VLLM_REMOTE_URL")
    assert url(env, dotenv) == ("http://b/v1", "environment VLLM_REMOTE_URL")
    assert url(env, dotenv, "teacher.url=http://a/v1") == ("http://a/v1", "flag")
    switched = resolve_pipeline(str(file), env=Environment({}, {"TEACHER_BACKEND": "hf"}))
    assert (switched.spec.teacher.backend, origin(switched, "teacher.backend")) == ("hf", ".env TEACHER_BACKEND")
    typed = resolve_pipeline(
        str(file), env={"TEACHER_BACKEND": "venice"}, overrides=["teacher.backend=hf"]
    )  # the flag is not overtaken by what the variable brings
    assert (typed.spec.teacher.backend, typed.spec.teacher.api_key_env) == ("hf", None)


@pytest.mark.parametrize(
    ("env", "overrides", "backend", "why"),
    [
        ({}, [], "hf", "teacher.model is a folder"),
        ({"TEACHER_BACKEND": "auto"}, [], "hf", "neither a server nor a store is named"),
        ({"VLLM_REMOTE_URL": SERVER}, [], "hf", "VLLM_REMOTE_URL is set, and counts only where TEACHER_BACKEND is"),
        ({"TEACHER_BACKEND": "auto", "VLLM_REMOTE_URL": SERVER}, [], "vllm-remote", "VLLM_REMOTE_URL is set"),
        ({"TEACHER_BACKEND": "auto", "VENICE_API_KEY": KEY}, [], "venice", "VENICE_API_KEY is set"),
        ({}, [f"teacher.url={SERVER}"], "openai", "teacher.url is named"),
        ({}, ["teacher.store=/s/targets.sqlite"], "store", "teacher.store is named"),
    ],
)
def test_auto_says_what_it_came_to_and_why(env: dict[str, str], overrides: list[str], backend: str, why: str) -> None:
    resolved = chosen(env, *overrides)
    assert resolved.spec.teacher.backend == backend
    assert why in origin(resolved, "teacher.backend")
    source = "environment TEACHER_BACKEND" if "TEACHER_BACKEND" in env else "default"
    assert origin(resolved, "teacher.backend").startswith(f"{source} (auto: ")


def test_a_pipeline_that_trains_its_teacher_never_asks_a_server_that_auto_found() -> None:
    env = {"TEACHER_BACKEND": "auto", "VLLM_REMOTE_URL": SERVER}
    resolved = resolve_pipeline("smoke", env=env)
    assert resolved.spec.teacher.backend == "hf"
    assert "the pipeline trains its teacher" in origin(resolved, "teacher.backend")


@pytest.mark.parametrize(
    ("env", "overrides", "named"),
    [
        ({"TEACHER_BACKEND": "venis"}, [], ["TEACHER_BACKEND='venis'", "environment variable", *BACKENDS]),
        ({"TEACHER_BACKEND": "vllm-remote"}, [], ["vllm-remote", "VLLM_REMOTE_URL"]),
        ({"TEACHER_BACKEND": "store"}, [], ["backend = 'store'", "store names none"]),
        ({"TEACHER_BACKEND": "vllm-local", "VLLM_MAX_MODEL_LEN": "16k"}, [], ["VLLM_MAX_MODEL_LEN='16k'", "max_model"]),
        ({"TEACHER_BACKEND": "vllm-local", "VLLM_GPU_MEMORY_UTIL": "80"}, [], ["80", "VLLM_GPU_MEMORY_UTIL"]),
        (
            {"TEACHER_BACKEND": "vllm-local", "TEACHER_REPO": "/a", "VLLM_LOCAL_MODEL": "/b"},
            [],
            ["TEACHER_REPO='/a'", "VLLM_LOCAL_MODEL='/b'"],
        ),
        ({}, ["teacher.url=ftp://h/v1"], ["ftp://h/v1", "http://"]),
        ({}, ["teacher.backend=vlm"], ["vlm", "vllm-local"]),
        ({}, ["teacher.api_key_env=sk-abc"], ["api_key_env"]),
        ({}, ["teacher.cache_readonly=true"], ["cache_readonly", "names no file"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_value_and_the_known_names(
    env: dict[str, str], overrides: list[str], named: list[str]
) -> None:
    with pytest.raises(RefusedError) as refused:
        chosen(env, *overrides)
    assert [part for part in named if part not in str(refused.value)] == [], str(refused.value)


@pytest.mark.parametrize("url", [f"http://me:{KEY}@host/v1", f"https://host/v1?api_key={KEY}", f"http://host/#{KEY}"])
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_url_with_a_secret_in_it_is_refused_without_repeating_it(url: str, by: str) -> None:
    env = {"TEACHER_BACKEND": "vllm-remote"} | ({"VLLM_REMOTE_URL": url} if by == "variable" else {})
    with pytest.raises(RefusedError) as refused:
        chosen(env, *([f"teacher.url={url}"] if by == "flag" else []))
    assert KEY not in str(refused.value) + str(refused.value.next)
    assert "api_key_env" in str(refused.value)


@pytest.mark.parametrize("field", ["teacher.api_key_env", "secrets"])
def test_a_key_that_stands_where_its_variables_name_belongs_is_not_repeated(field: str) -> None:
    with pytest.raises(RefusedError, match="no name of an environment variable") as refused:
        chosen({}, f"{field}={KEY if field != 'secrets' else [KEY]}")
    assert KEY not in str(refused.value)
    assert field in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        f"me:{KEY}@host/v1",
        f"http:/me:{KEY}@host/v1",
        f"//me:{KEY}@host/v1",
        f"http://host/v1\nX: {KEY}",
        "http://h:0/v1",
    ],
)
def test_what_is_no_url_is_refused_where_it_is_planned_and_not_repeated_where_a_password_may_stand_in_it(
    url: str,
) -> None:
    with pytest.raises(RefusedError, match="url") as refused:
        chosen({"TEACHER_BACKEND": "vllm-remote", "VLLM_REMOTE_URL": url})
    assert KEY not in str(refused.value)


def test_a_server_without_a_folder_for_its_tokenizer_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"teacher\.model names no tokenizer"):
        resolve_pipeline("smoke", env={"TEACHER_BACKEND": "vllm-remote", "VLLM_REMOTE_URL": SERVER})


def test_the_value_of_a_key_is_in_no_spec_no_identity_and_no_view_of_either() -> None:
    env = Environment({"TEACHER_BACKEND": "venice"}, {"VENICE_API_KEY": KEY})
    chats = [FOLDER, "data.documents=chat", "score.k=20"]
    resolved = resolve_pipeline("smoke", env=env, overrides=chats)
    spec, notes = effective_pipeline(resolved.spec)
    runs = pipeline_runs(spec, digests={"/models/t": "3" * 64}, code="1" * 64, lock="2" * 64)
    said = "".join([repr(resolved), repr(env), *notes, *(run.identity.canonical.decode() for run in runs)])
    assert KEY not in said
    assert spec.secrets == ("VENICE_API_KEY",)
    assert {run.kind: run.identity.secrets for run in runs}["data"] == ("VENICE_API_KEY",)


def test_how_a_teacher_is_reached_changes_no_run_but_who_answers_does() -> None:
    def score(*overrides: str) -> str:
        spec, _ = effective_pipeline(chosen({}, f"teacher.url={SERVER}", *overrides).spec)
        runs = pipeline_runs(spec, digests={"/models/t": "3" * 64}, code="1" * 64, lock="2" * 64)
        return {run.kind: run.run_id for run in runs}["score"]

    first = score()
    assert first == score("teacher.concurrency=2", "teacher.timeout=5.0", "teacher.cache=/c", "teacher.max_requests=9")
    assert len({first, score("teacher.served_model=b"), score("teacher.url=http://b/v1"), score("score.k=8")}) == 4


def test_spec_show_says_which_layer_a_name_came_from_and_shows_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(
        f"TEACHER_BACKEND=vllm-remote\nVLLM_REMOTE_URL={SERVER}\nVLLM_REMOTE_API_KEY={KEY}\n"
    )
    monkeypatch.setenv("VLLM_REMOTE_URL", "http://127.0.0.1:9/v1")
    assert main(["spec", "show", "smoke", "--set", FOLDER]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert shown["teacher.backend"].endswith(".env TEACHER_BACKEND")
    assert shown["teacher.url"].endswith("environment VLLM_REMOTE_URL")
    assert shown["teacher.model"].endswith("flag")
    assert "VLLM_REMOTE_API_KEY" in shown["teacher.api_key_env"]
    assert KEY not in "".join(shown.values())


def test_a_dotenv_file_is_read_as_it_is_usually_written(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(
        b"\xef\xbb\xbf# teachers\r\nexport A=1\r\n\r\n  B = two words # why\nC='it is $5 # not a comment'\n"
        b'D="a \\"b\\"\\nc"\nE=\nF="two\nlines"  # yes\nG=a#b\n'
    )
    assert read_dotenv(tmp_path / ".env") == {
        "A": "1", "B": "two words", "C": "it is $5 # not a comment", "D": 'a "b"\nc', "E": "", "F": "two\nlines",
        "G": "a#b",
    }  # fmt: skip
    assert read_dotenv(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A=1\nsecret-without-name\n", "line 2"),
        ("A=1\nA=2\n", "line 2: A is set a second time"),
        ("K='never closed\n", "line 1: K has no closing quote"),
        ("K=${HOME}/x\n", "line 1: K holds a $"),
        ('A="x\ny"\nK="a" b\n', "line 3: K has something behind"),
        ("TEACHER_BACKEND=venice\rK=secret-without-name\r", "line 1: TEACHER_BACKEND holds a carriage return"),
    ],
)
def test_a_dotenv_line_that_cannot_be_meant_is_named_and_its_value_is_not(text: str, said: str) -> None:
    with pytest.raises(RefusedError) as refused:
        parse_dotenv(text)
    assert said in str(refused.value)
    assert "secret-without-name" not in str(refused.value)


def test_a_dotenv_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    for name, said in (("pipe", "is a pipe"), ("link", "is a link to a file that is not there")):
        with pytest.raises(RefusedError, match=said):
            read_dotenv(tmp_path / name)


@given(values=st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True), st.text(max_size=30), max_size=4))
def test_what_is_quoted_comes_back_whole(values: dict[str, str]) -> None:
    values = {name: value.replace("\0", "").replace("\r", "") for name, value in values.items()}
    escaped = {
        name: value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") for name, value in values.items()
    }
    assert parse_dotenv("".join(f'{name}="{value}"\n' for name, value in escaped.items())) == values


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(RefusedError):
        assert all(isinstance(value, str) for value in parse_dotenv(text).values())


def test_every_name_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
    assert [name for name in ALL_NAMES if f"`{name}`" not in page] == []
