"""Reading a pipeline: file, environment and flags joined, each value with where it came from."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from latentforge.errors import RefusedError
from latentforge.spec import choice
from latentforge.spec.dotenv import origin_of
from latentforge.spec.recipe import RecipeFile, read_recipe
from latentforge.spec.sections import PipelineSpec, TeacherSpec

ENVIRONMENT = {
    "TEACHER_REPO": "teacher.model",
    "STUDENT_INIT": "distill.student.init",
    "STEPS": "distill.steps",
    "BATCH_SIZE": "distill.batch_size",
    "LR": "distill.learning_rate",
    "T": "distill.temperature",
}
"""The operator's names, and the field that each sets. ``ALPHA`` sets both weights of the final student run."""

FOR_A_CODEC = {
    "TEACHER_REPO": "teacher.model",
    "STEPS": "autoencoder.steps",
    "BATCH_SIZE": "autoencoder.batch_size",
    "LR": "autoencoder.learning_rate",
}
"""The same where the pipeline's last run trains a codec; the other names mean nothing to it and are refused."""

FOR_A_LATENT_STUDENT = {
    "TEACHER_REPO": "teacher.model",
    "STEPS": "latent.steps",
    "BATCH_SIZE": "latent.batch_size",
    "LR": "latent.learning_rate",
    "T": "latent.token_temperature",
}
"""The same where it trains a latent student, of which ``T`` and ``ALPHA`` are of the token head."""

_BY_GOAL = {"autoencoder": FOR_A_CODEC, "latent": FOR_A_LATENT_STUDENT}
_OF_ANOTHER_STUDENT = {"autoencoder": ("STUDENT_INIT", "T", "ALPHA"), "latent": ("STUDENT_INIT",)}
_ALPHA_FIELDS = {"latent": ("latent.token_ce_weight", "latent.token_kd_weight")}


@dataclass(frozen=True)
class Origin:
    """Where a value came from: ``default``, ``preset``, ``file``, ``.env NAME``, ``environment NAME`` or ``flag``.

    ``why`` is the reason of a value that was chosen.
    """

    source: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.source} ({self.why})" if self.why else self.source


@dataclass(frozen=True)
class ResolvedPipeline:
    """A validated pipeline, its name, and the origin of each of its values by dotted field name."""

    name: str
    spec: PipelineSpec
    origins: dict[str, Origin]

    def values(self) -> Iterator[tuple[str, Any, Origin]]:
        """(field, value, origin) of every value, in the order of the sections."""
        for field, value in _leaves(self.spec.model_dump(mode="json")):
            yield field, value, self.origins.get(field, Origin("default"))


def resolve_pipeline(
    recipe: str, *, env: Mapping[str, str] | None = None, overrides: Sequence[str] = ()
) -> ResolvedPipeline:
    """Read a recipe by name or a pipeline file by path, and lay environment and ``FIELD=VALUE`` flags over it.

    Precedence: flag > environment > .env > file > default (``env`` may be a
    :class:`latentforge.spec.dotenv.Environment`). A value that does not parse is an error, never a default.
    """
    file = read_recipe(recipe)
    values, origins = _laid(file, env or {}, overrides)
    _require(file, file.needs, values)
    spec = _validated(_tree(values), origins, file.name)
    return ResolvedPipeline(file.name, spec, origins)


def resolve_teacher(
    recipe: str | None, *, env: Mapping[str, str], overrides: Sequence[str] = ()
) -> tuple[TeacherSpec, dict[str, Origin]]:
    """The teacher's section alone, of a recipe or of nothing but environment and flags, with its values' origins.

    Here no pipeline trains a teacher: without a recipe, ``auto`` counts as said.
    """
    nothing = RecipeFile("no file", "no file", {"teacher": {"backend": "auto"}}, ())
    file = read_recipe(recipe) if recipe is not None else nothing
    values, origins = _laid(file, env, overrides, alone=recipe is None)
    _require(file, [field for field in file.needs if field.startswith("teacher.")], values)
    kept = {field: value for field, value in values.items() if field.startswith("teacher.")}
    tree = _tree(kept)
    try:
        section = TeacherSpec.model_validate_json(json.dumps(tree.get("teacher", {}), default=str))
    except ValidationError as error:
        problems = [{**one, "loc": ("teacher", *one["loc"])} for one in error.errors(include_url=False)]
        raise RefusedError("; ".join(_told(one, origins, file.name) for one in problems)) from None
    return section, {field: origin for field, origin in origins.items() if field in kept}


def _require(file: RecipeFile, needs: Sequence[str], values: Mapping[str, Any]) -> None:
    """Refuse a pipeline for which a value is given nowhere that its file leaves to whoever launches it."""
    for field in needs:
        annotation = _annotation(field, f"needs of {file.name}")
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            raise RefusedError(f"needs names {field!r}, which is a table ({file.name})", next="name one of its fields")
    missing = [field for field in needs if values.get(field) is None]
    if not missing:
        return
    of_goal = _BY_GOAL.get(str(values.get("through")), ENVIRONMENT)
    variables = {field: variable for variable, field in of_goal.items()}
    given = [f"{variables[field]}=…" for field in missing if field in variables]
    flags = [f"--set {field}=…" for field in missing if field not in variables]
    raise RefusedError(
        f"{file.name} needs {' and '.join(missing)}: no variable and no flag says which",
        next=" ".join([*given, "latentforge dispatch go", file.asked, *flags]),
    )


def _laid(
    file: RecipeFile, env: Mapping[str, str], overrides: Sequence[str], *, alone: bool = False
) -> tuple[dict[str, Any], dict[str, Origin]]:
    """Values and origins by dotted field: the document's, with the environment and the flags over them."""
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    _check_keys(file.document, PipelineSpec, prefix="", where=file.name)
    for field, value in _leaves(file.document):
        values[field], origins[field] = value, Origin("default" if alone else "file")
    flags = list(_from_flags(overrides))
    through = next((value for field, value, _source in reversed(flags) if field == "through"), values.get("through"))
    for field, value, source in [*_from_environment(env, str(through)), *flags]:
        values[field], origins[field] = value, Origin(source)
    _choose_backend(values, origins, env, alone=alone)
    for field, value, source in flags:  # what is typed wins over the names of a backend, too
        if field != "teacher.backend":
            values[field], origins[field] = value, Origin(source)
    if "EPOCHS" in env and not alone:
        _lay_epochs(values, origins, env, str(through or PipelineSpec.model_fields["through"].default))
    return values, origins


def _lay_epochs(values: dict[str, Any], origins: dict[str, Origin], env: Mapping[str, str], trained: str) -> None:
    """``EPOCHS`` in steps of the pipeline's last run, ``trained``: the fewest that go so often through all rows
    (a batch goes on into the next epoch)."""
    field, shown, source = f"{trained}.steps", f"EPOCHS={env['EPOCHS']!r}", origin_of(env, "EPOCHS")
    epochs = _scalar(env["EPOCHS"], field, shown, _noun(source))
    if epochs < 1:
        raise RefusedError(f"{shown} is less than 1 ({_noun(source)}; spec field {field})")
    other = origins.get(field, Origin("default"))
    if other.source not in ("default", "file"):
        raise RefusedError(f"{shown} and {other} both say how long {trained} is trained", next="give one of them")
    rows = values.get("data.train_sequences")
    size = values.get(f"{trained}.batch_size", _default(f"{trained}.batch_size"))
    if not isinstance(rows, int) or not isinstance(size, int) or size < 1:
        raise RefusedError(
            f"{shown} is so many times all training rows, and data.train_sequences does not say how many there are",
            next="give --set data.train_sequences=1000, or STEPS in place of EPOCHS",
        )
    values[field] = -(-epochs * rows // size)
    origins[field] = Origin(source, f"{epochs} times {rows} rows, {size} a step")


def _default(field: str) -> Any:
    model: Any = PipelineSpec
    *parents, last = field.split(".")
    for parent in parents:
        model = model.model_fields[parent].annotation
    return model.model_fields[last].default


def _from_environment(env: Mapping[str, str], through: str) -> Iterator[tuple[str, Any, str]]:
    fields = _BY_GOAL.get(through, ENVIRONMENT)
    for variable in _OF_ANOTHER_STUDENT.get(through, ()):
        if variable in env:
            what = "a student" if through == "autoencoder" else "a token-level student"
            raise RefusedError(
                f"{variable}={env[variable]!r} is of {what}, and through = {through!r} makes none "
                f"({_noun(origin_of(env, variable))})",
                next=f"unset {variable}",
            )
    for variable, field in fields.items():
        if variable in env:
            source = origin_of(env, variable)
            yield field, _scalar(env[variable], field, f"{variable}={env[variable]!r}", _noun(source)), source
    if "ALPHA" in env:
        named = _ALPHA_FIELDS.get(through, ("distill.ce_weight", "distill.kd_weight"))
        for field, value in zip(named, _weights(env["ALPHA"], named), strict=True):
            yield field, value, origin_of(env, "ALPHA")
    if choice.VARIABLE in env:
        source = origin_of(env, choice.VARIABLE)
        yield "teacher.backend", choice.check_backend(env[choice.VARIABLE], _noun(source)), source


def _noun(source: str) -> str:
    return "environment variable" if source.startswith("environment ") else source


def _choose_backend(
    values: dict[str, Any], origins: dict[str, Origin], env: Mapping[str, str], *, alone: bool = False
) -> None:
    """Settle what ``auto`` comes to, and lay the variables of the chosen backend over the file's values."""
    backend = values.get("teacher.backend", "auto")
    if backend == "auto":
        said = "teacher.backend" in values
        backend, why = choice.auto(values, env, said=said, alone=alone)
        source = origins["teacher.backend"].source if said else "default"
        values["teacher.backend"], origins["teacher.backend"] = backend, Origin(source, f"auto: {why}")
    choice.check_one_model(env, str(backend))
    for variable, field in choice.variables(str(backend), env):
        source = origin_of(env, variable)
        # A URL may hold a password: the section refuses it without repeating it.
        shown = variable if field == "teacher.url" else f"{variable}={env[variable]!r}"
        values[field], origins[field] = _scalar(env[variable], field, shown, _noun(source)), Origin(source)
    key = choice.KEYS.get(str(backend))
    if key is not None and env.get(key) and "teacher.api_key_env" not in values:
        values["teacher.api_key_env"] = key
        origins["teacher.api_key_env"] = Origin(f"preset {backend}", f"{key} is set")
    for field, value in choice.PRESETS.get(str(backend), {}).items():
        if field not in values:
            values[field], origins[field] = value, Origin(f"preset {backend}")


def _weights(text: str, fields: tuple[str, str]) -> tuple[float, float]:
    """``ALPHA`` is the weight of cross-entropy, 1 − ALPHA that of KD, computed in decimal so that 0.3 leaves 0.7;
    ``fields`` are those that they set."""
    shown = f"ALPHA={text!r}"
    try:
        alpha = Decimal(text.strip())
    except InvalidOperation:
        raise RefusedError(
            f"{shown} is not a number (environment variable; spec fields {fields[0]} and {fields[1]})"
        ) from None
    if not (alpha.is_finite() and 0 <= alpha <= 1):
        raise RefusedError(f"{shown} is not between 0 and 1 (environment variable; the weight of cross-entropy)")
    return float(alpha), float(1 - alpha)


def _from_flags(overrides: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    for override in overrides:
        field, equals, text = override.partition("=")
        field = field.strip()
        if not equals or not field:
            raise RefusedError(f"--set {override!r} is not FIELD=VALUE", next="for example --set distill.steps=100")
        annotation = _annotation(field, "flag --set")
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            raise RefusedError(f"--set {override!r}: {field} is a table; set one of its fields")
        yield field, _scalar(text, field, f"--set {override!r}", "flag"), "flag"


def _scalar(text: str, field: str, shown: str, source: str) -> Any:
    """A TOML value; a field that holds text takes the text as it is."""
    annotation = _annotation(field, source)
    kinds = {list} if get_origin(annotation) is tuple else _kinds(annotation)
    if str in kinds:
        return _unquoted(text)
    noun = "a whole number" if kinds == {int} else "a number" if float in kinds else "a TOML value"
    try:
        value = _toml(text)
    except ValueError:
        raise RefusedError(f"{shown} is not {noun} ({source}; spec field {field})") from None
    if kinds == {int} and (not isinstance(value, int) or isinstance(value, bool)):
        raise RefusedError(f"{shown} is not {noun} ({source}; spec field {field})")
    return value


def _unquoted(text: str) -> str:
    try:
        value = _toml(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def _toml(text: str) -> Any:
    """One TOML value and nothing behind it."""
    document = tomllib.loads(f"value = {text.strip()}\n")
    if list(document) != ["value"]:
        raise ValueError(text)
    return document["value"]


def _annotation(field: str, where: str) -> Any:
    model: Any = PipelineSpec
    walked = ""
    for part in field.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise RefusedError(f"unknown key {field!r} ({where}): {walked.rstrip('.')} has no fields")
        if part not in model.model_fields:
            raise _unknown_key(walked + part, part, model, where, prefix=walked)
        model = model.model_fields[part].annotation
        walked += part + "."
    return model


def _kinds(annotation: Any) -> set[type]:
    """The plain types that an annotation admits."""
    if isinstance(annotation, type):
        return {annotation}
    arguments = get_args(annotation)
    if arguments and all(isinstance(item, str) for item in arguments):  # Literal["store", "live"]
        return {str}
    return {kind for item in arguments if item is not type(None) and item is not ... for kind in _kinds(item)}


def _check_keys(document: dict[str, Any], model: type[BaseModel], *, prefix: str, where: str) -> None:
    for key, value in document.items():
        if key not in model.model_fields:
            raise _unknown_key(prefix + key, key, model, where, prefix=prefix)
        inner = model.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if not isinstance(value, dict):
                raise RefusedError(f"{prefix}{key} = {value!r} is not a table ({where})")
            _check_keys(value, inner, prefix=f"{prefix}{key}.", where=where)


def _unknown_key(field: str, key: str, model: type[BaseModel], where: str, *, prefix: str) -> RefusedError:
    close = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {prefix + close[0]!r}?" if close else "known: " + ", ".join(model.model_fields)
    return RefusedError(f"unknown key {field!r} ({where}); {hint}")


def _validated(tree: dict[str, Any], origins: dict[str, Origin], name: str) -> PipelineSpec:
    try:
        return PipelineSpec.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        lines = [_told(problem, origins, name) for problem in error.errors(include_url=False)]
        raise RefusedError("; ".join(lines)) from None


def _told(problem: Any, origins: dict[str, Origin], name: str) -> str:
    """One problem of pydantic's as a sentence that names field, value and origin."""
    field = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not field or isinstance(problem["input"], dict):
        where = f"{field}: " if field else ""
        return f"{where}{message} ({_named_sources(field, message, origins) or name})"
    origin = origins.get(field) or next((o for f, o in origins.items() if field.startswith(f)), Origin("default"))
    source = name if origin.source == "file" else origin.source
    if problem["type"] == "string_pattern_mismatch":  # of a variable's name: whoever gave the key itself is not quoted
        return (
            f"{field} is no name of an environment variable (A-Z, 0-9 and _; not shown: it may be the key) ({source})"
        )
    return f"{field} = {problem['input']!r}: {message} ({source})"


def _named_sources(section: str, message: str, origins: dict[str, Origin]) -> str:
    """The flags and variables that set what a message about a whole section names."""
    said = set(re.findall(r"\w+", message))
    found = {
        origin.source
        for field, origin in origins.items()
        if field.startswith(section) and field.rpartition(".")[2] in said and origin.source != "file"
    }
    return ", ".join(sorted(found))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _tree(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for field, value in values.items():
        *parents, last = field.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
