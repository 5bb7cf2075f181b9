"""Which backend a teacher has: ``TEACHER_BACKEND``, the names of each backend, and what ``auto`` comes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from latentforge.errors import RefusedError
from latentforge.spec.fields import Backend
from latentforge.spec.sections import TeacherSpec

VARIABLE = "TEACHER_BACKEND"
BACKENDS: tuple[str, ...] = get_args(Backend)

VENICE_URL = "https://api.venice.ai/api/v1"
"""The hosted API of backend ``venice``, where VENICE_BASE_URL names no other."""

_ENGINE = {
    "VLLM_LOCAL_MODEL": "teacher.model",
    "VLLM_QUANTIZATION": "teacher.quantization",
    "VLLM_MAX_MODEL_LEN": "teacher.max_model_len",
    "VLLM_GPU_MEMORY_UTIL": "teacher.gpu_memory_utilization",
    # A run is started with few of the user's variables, and this is not one of them: its value goes by the spec.
    "LATENTFORGE_VLLM_ENVIRONMENT": "teacher.environment",
}
NAMES: dict[str, dict[str, str]] = {
    "venice": {"VENICE_BASE_URL": "teacher.url", "VENICE_MODEL": "teacher.served_model"},
    "vllm-remote": {"VLLM_REMOTE_URL": "teacher.url", "VLLM_LOCAL_MODEL": "teacher.model"},
    "vllm-local": _ENGINE,
    "vllm-local-inproc": _ENGINE,
}
"""The variables that each backend reads, and the field that each sets; those of the other backends are left alone."""

KEYS = {"venice": "VENICE_API_KEY", "vllm-remote": "VLLM_REMOTE_API_KEY"}
"""The variable in which each preset expects its key. A value never enters a spec: the field holds this name."""

PRESETS: dict[str, dict[str, Any]] = {
    "venice": {"teacher.url": VENICE_URL, "teacher.api_key_env": "VENICE_API_KEY"},
}
"""What a backend sets where nobody else does."""

ALL_NAMES = tuple(sorted({VARIABLE, *KEYS.values(), *(name for names in NAMES.values() for name in names)}))


def check_backend(value: str, source: str) -> str:
    """The backend's name; refused with the known ones."""
    if value not in BACKENDS:
        raise RefusedError(f"{VARIABLE}={value!r} is not one of: {', '.join(BACKENDS)} ({source})")
    return value


def auto(values: Mapping[str, Any], env: Mapping[str, str], *, said: bool, alone: bool = False) -> tuple[str, str]:
    """(backend, why) that ``auto`` comes to; ``values`` holds what file and flags say by dotted field.

    The variables of other backends count only where ``auto`` was *said* (variable, file or flag): a
    ``VLLM_REMOTE_URL`` that lies in the environment for something else sends no pipeline's text away. ``alone``: there
    is no pipeline, so none that trains its teacher.
    """
    for field, backend in (("teacher.store", "store"), ("teacher.url", "openai")):
        if values.get(field) is not None:
            return backend, f"{field} is named"
    found = [
        (backend, variable)
        for backend, variable in (
            ("vllm-remote", "VLLM_REMOTE_URL"),
            ("vllm-local", "VLLM_LOCAL_MODEL"),
            ("venice", "VENICE_API_KEY"),
        )
        if env.get(variable)
    ]
    folder = values.get("teacher.model") or env.get("TEACHER_REPO") or env.get("VLLM_LOCAL_MODEL")
    if not said:
        stray = f"; {found[0][1]} is set, and counts only where {VARIABLE} is" if found and folder else ""
        return "hf", ("teacher.model is a folder" if folder else "the pipeline trains its teacher") + stray
    if not folder and not alone:
        return "hf", "the pipeline trains its teacher, which no server has"
    if found:
        return found[0][0], f"{found[0][1]} is set"
    return "hf", "neither a server nor a store is named"


def auto_of(teacher: TeacherSpec) -> tuple[str, str]:
    """(backend, why) that ``auto`` comes to for a section alone, without an environment."""
    return auto({f"teacher.{name}": value for name, value in teacher.model_dump().items()}, {}, said=False)


def variables(backend: str, env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(variable, field) of each variable of a backend that is set; an empty one is as good as none."""
    for name, field in NAMES.get(backend, {}).items():
        if env.get(name):
            yield name, field


def check_one_model(env: Mapping[str, str], backend: str) -> None:
    """Refuse two names of the teacher's folder that disagree."""
    one, other = env.get("TEACHER_REPO"), env.get("VLLM_LOCAL_MODEL")
    if one and other and one != other and "VLLM_LOCAL_MODEL" in NAMES.get(backend, {}):
        raise RefusedError(
            f"TEACHER_REPO={one!r} and VLLM_LOCAL_MODEL={other!r} name two teachers for backend {backend!r}",
            next="unset one of them",
        )
