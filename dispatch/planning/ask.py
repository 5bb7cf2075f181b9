"""What one `go` asks for: a pipeline, a host, the code to run it with. Everything that a plan needs beside facts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dispatch.building.bundle import Bundle, code_label, pack
from dispatch.hosts.inventory import Host
from dispatch.planning.command import Command
from dispatch.planning.lane import LaneChoice
from dispatch.planning.secrets import check_names, values
from latentforge.errors import RefusedError
from latentforge.spec.code import CodeSource, code_around, running_code
from latentforge.spec.dotenv import Environment
from latentforge.spec.pipeline import BUILTIN_CORPUS, effective_pipeline
from latentforge.spec.resolve import ResolvedPipeline, resolve_pipeline
from latentforge.spec.sections import PipelineSpec


@dataclass(frozen=True)
class Ask:
    """The laptop's half of a plan's input. ``unfit`` says why the running interpreter cannot serve host ``local``."""

    recipe: str
    spec: PipelineSpec
    notes: tuple[str, ...]
    host: Host
    code: str
    code_label: str
    lock_name: str
    lock: str
    bundle: Bundle | None = None
    attempt_next: bool = False
    wait: bool = False
    unfit: str | None = None
    lane: LaneChoice | None = None
    no_secrets: str | None = None
    """Why the secrets that the pipeline names cannot be given, or None."""
    waived: tuple[tuple[str, str], ...] = ()
    """(check, why its failure is let through); kept with the run."""
    hosts: tuple[str, ...] = ()
    """The two hosts of a run that is spread over both, the leader first; empty where it has one to itself."""
    command: str = ""
    """The command that does what is asked, to copy: with the flags and the environment that steered it."""


def asked(
    recipe: str,
    host: Host,
    *,
    env: Mapping[str, str],
    overrides: Sequence[str] = (),
    attempt_next: bool = False,
    wait: bool = False,
    lanes: Sequence[str] = (),
    hosts: Sequence[str] = (),
    waived: Sequence[tuple[str, str]] = (),
    folder: Path | None = None,
    stale: Callable[[], str | None] = lambda: None,
) -> Ask:
    """Resolve the pipeline and the code around ``folder`` (the current one); RefusedError for what cannot be meant.

    ``stale`` says why the built extension of the running interpreter is not that of its sources, or None.
    """
    resolved = resolve_pipeline(recipe, env=env, overrides=overrides)
    spec, notes = effective_pipeline(_with_absolute_paths(resolved.spec, host))
    _check_engine(spec, host)
    check_names(spec.secrets)
    if isinstance(env, Environment):
        env.export(spec.secrets)  # what keeps evidence clean of secrets looks for them in this process's environment
    if spec.secrets:
        notes.append(f"secrets are given by name: {', '.join(sorted(spec.secrets))}")
    source = code_around(folder)
    where = ("--lanes", ",".join(lanes)) if lanes else ("--host", ",".join(hosts) or host.name)
    return Ask(
        recipe=recipe,
        spec=spec,
        notes=tuple(notes),
        host=host,
        code=source.digest,
        code_label=code_label(source),
        lock_name=host.lock,
        lock=source.lock_sha256(host.lock),
        bundle=None if host.is_local else pack(source),
        attempt_next=attempt_next,
        wait=wait,
        waived=tuple(waived),
        hosts=tuple(hosts),
        command=_command(recipe, where, resolved, env, overrides, waived),
        no_secrets=_missing(spec.secrets, env),
        unfit=(_unfit(source) or stale()) if host.is_local else None,
    )


def _missing(names: Sequence[str], env: Mapping[str, str]) -> str | None:
    try:
        values(names, env)
    except RefusedError as error:
        return str(error)
    return None


# What says where, not what: left out of a copied command, it would do the same elsewhere.
_PLACES = ("GX10_USER", "GX10_REPO_PATH", "EVIDENCE_DIR")


def _command(
    recipe: str,
    where: Sequence[str],
    resolved: ResolvedPipeline,
    env: Mapping[str, str],
    overrides: Sequence[str],
    waived: Sequence[tuple[str, str]],
) -> str:
    sources = {origin.source for origin in resolved.origins.values()}
    names = sorted(source.partition(" ")[2] for source in sources if source.startswith("environment "))
    names = sorted({*names, *_PLACES})
    variables = {name: env[name] for name in names if env.get(name)}
    flags = [word for override in overrides for word in ("--set", override)]
    flags += [word for check, why in waived for word in ("--waive", f"{check}={why}")]
    return str(Command.of(["latentforge", "dispatch", "go", recipe, *flags, *where], variables, env))


def _unfit(source: CodeSource) -> str | None:
    """Why the interpreter that runs this command cannot run the pipeline; None where it can."""
    from importlib.util import find_spec

    running = running_code()
    if running.digest != source.digest:
        where = running.root or "an installed package"
        return f"the running latentforge is {where}, which is not the code of this checkout ({source.root})"
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    return f"this interpreter lacks {', '.join(missing)}: it is an operator's install" if missing else None


def _with_absolute_paths(spec: PipelineSpec, host: Host) -> PipelineSpec:
    """The pipeline with the user's paths as the host will see them.

    On ``local`` a relative path starts at the current folder. On another host the laptop's current folder means
    nothing, so a relative path is refused.
    """

    def absolute(field: str, path: str) -> str:
        if os.path.isabs(path) or path.startswith("~"):
            return os.path.expanduser(path) if host.is_local else path
        if host.is_local:
            return os.path.abspath(path)
        raise RefusedError(
            f"{field} = {path!r} is relative, and names nothing on {host.name}",
            next=f"give the path on {host.name}, beginning with / or ~/",
        )

    if spec.data.corpus != BUILTIN_CORPUS:
        data = spec.data.model_copy(update={"corpus": absolute("data.corpus", spec.data.corpus)})
        spec = spec.model_copy(update={"data": data})
    teacher, placed = spec.teacher, {}
    for name in ("model", "store", "cache", "environment"):
        path = getattr(teacher, name)
        if path is not None and not (name == "model" and _pinned("teacher.model", path, host)):
            placed[name] = absolute(f"teacher.{name}", path)
    spec = spec.model_copy(update={"teacher": teacher.model_copy(update=placed)})
    init = spec.distill.student.init
    if init is not None and not _pinned("distill.student.init", init, host):
        student = spec.distill.student.model_copy(update={"init": absolute("distill.student.init", init)})
        spec = spec.model_copy(update={"distill": spec.distill.model_copy(update={"student": student})})
    return spec


def _check_engine(spec: PipelineSpec, host: Host) -> None:
    """Refuse a vLLM of our own whose environment nobody names: the score run would, after the data has been made.

    On ``local`` it is looked at, too.
    """
    backend, environment = spec.teacher.backend, spec.teacher.environment
    if backend not in ("vllm-local", "vllm-local-inproc"):
        return
    if environment is None:
        raise RefusedError(
            f"teacher.backend = {backend!r} needs an environment with vLLM on {host.name}, and teacher.environment "
            "names none (nor does LATENTFORGE_VLLM_ENVIRONMENT)",
            next="make one there:  python3 -m venv vllm && vllm/bin/python -m pip install vllm\n"
            "then the same command with  --set teacher.environment=FOLDER",
        )
    if host.is_local and not (Path(environment) / "bin" / "python").exists():
        raise RefusedError(
            f"teacher.environment = {environment!r} is no Python environment: it has no bin/python",
            next="--set teacher.environment=FOLDER  of a virtual environment with vLLM",
        )


def _pinned(name: str, path: str, host: Host) -> bool:
    """Whether a field names a model by ``repo@commit``; refused where it names a branch."""
    if "@" not in path:
        return False
    from dispatch.pulling.pipeline import check_pinned  # what speaks to hubs is slow to import, and seldom needed

    return check_pinned(name, path, host)
