"""What a request may say: each field is honoured or refused by its name, and none is rounded or guessed."""

from __future__ import annotations

import json
import sys
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from latentforge.serve.limits import STOP_CHARACTERS, STOPS
from latentforge.serve.refusing import Refusal, shown

Prompt = str | tuple[int, ...]
_INT64 = 2**63
_IDS = {"type": "array", "items": {"type": "integer"}}
_PROMPTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, _IDS, {"type": "array"}]}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(value: list[Any], where: str = "") -> tuple[int, ...]:
    for place, token in enumerate(value):
        if not _whole(token):
            raise ValueError(f"{where}token {place} is {shown(token)}, not a whole number")
    return tuple(value)


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, list):
        value = _ids(value)
    else:
        raise ValueError("is neither a text nor a list of token ids")
    if not value:
        raise ValueError("is empty: a text or at least one token is needed to begin with")
    found: Prompt = value
    return found


def _prompts(value: Any) -> list[Prompt]:
    """One prompt, or a list of them, as a list; by hand: a union would report each item under each of its members."""
    if not isinstance(value, list) or (value and _whole(value[0])):
        return [_prompt(value)]
    if not value:
        raise ValueError("is empty: a text or at least one token is needed to begin with")
    kind = type(value[0])
    found = []
    for place, one in enumerate(value):
        if type(one) is not kind or kind not in (str, list):
            raise ValueError(f"item {place} is {shown(one)}: all are texts, all token ids, or all lists of token ids")
        try:
            found.append(_prompt(one))
        except ValueError as error:
            raise ValueError(f"item {place}: {error}") from None
    return found


def _stops(value: Any) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or len(stops) > STOPS:
        raise ValueError(f"is neither a text nor a list of at most {STOPS} texts")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= STOP_CHARACTERS:
            raise ValueError(f"{shown(stop)} is no text of 1 to {STOP_CHARACTERS} characters")
        _check_text(stop)
    return tuple(stops)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a character (a lone surrogate) at place {error.start}") from None


def _unweighted(value: dict[str, Any]) -> dict[str, Any]:
    if value:
        raise ValueError("is not empty: no token is weighted here")
    return value


class _Ask(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


Stop = Annotated[
    Any, BeforeValidator(_stops), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "maxItems": STOPS}]})
]
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64)]
Method = Literal["head", "exact", "vote", "tokens"]
Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(gt=0, le=1)]
Nothing = Annotated[None, BeforeValidator(lambda value: None if value == "" else value)]
Zero = Annotated[Literal[0], BeforeValidator(lambda value: 0 if type(value) is float and value == 0 else value)]
Count = Annotated[int, Field(ge=1)]
Deadline = Annotated[float, Field(gt=0)]


class StreamOptions(_Ask):
    """OpenAI's ``stream_options``."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = Field(None, description="refused unless false: nothing is padded")


class CompletionAsk(_Ask):
    """OpenAI's schema of completions; what cannot be honoured is refused. ``method``, ``draws``, ``top_k``,
    ``deadline`` are ours."""

    model: str = Field(description="the served model's name")
    prompt: Annotated[Any, BeforeValidator(_prompts), WithJsonSchema(_PROMPTS)] = Field(
        description="a text, a list of texts, token ids, or a list of lists of token ids"
    )
    max_tokens: Count | None = Field(None, description="new tokens of each text; 16 by default")
    temperature: Temperature | None = Field(None, description="0 to 2, 1 by default; 0 is greedy")
    top_p: Share | None = Field(None, description="below 1: token after token, by their probabilities")
    n: Count | None = Field(None, description="texts of each prompt")
    best_of: Count | None = Field(None, description="write so many, answer with the n likeliest by token")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = Field((), description=f"at most {STOPS} texts, not part of the answer")
    seed: Seed | None = Field(None, description="the same request and seed give the same texts, whatever runs beside")
    echo: bool | None = Field(None, description="begin each text with its prompt")
    logprobs: Literal[0] | None = Field(None, description="0: of each token itself; its alternatives are not kept")
    suffix: Nothing = Field(None, description="refused unless empty: the model writes on from a prompt alone")
    presence_penalty: Zero | None = Field(None, description="refused unless 0")
    frequency_penalty: Zero | None = Field(None, description="refused unless 0")
    logit_bias: Annotated[dict[str, Any], AfterValidator(_unweighted)] | None = Field(
        None, description="refused unless empty"
    )
    user: str | None = Field(None, description="accepted, and kept nowhere")
    method: Method | None = Field(None, description="not OpenAI's: how a chunk is chosen")
    draws: Count | None = Field(None, description="not OpenAI's: draws for a chunk, at most (exact, vote)")
    top_k: Count | None = Field(None, description="not OpenAI's: token after token, of the likeliest")
    deadline: Deadline | None = Field(None, description="not OpenAI's: seconds from the request on")


class GenerateAsk(_Ask):
    """What the model can be asked, by its own names."""

    prompt: Annotated[Any, BeforeValidator(_prompt), WithJsonSchema({"anyOf": [{"type": "string"}, _IDS]})] = Field(
        description="a text, or token ids"
    )
    max_new_tokens: Count | None = Field(None, description="128 by default, or fewer where the server's limit is")
    method: Method | None = Field(
        None,
        description="head: one draw a chunk; exact: by rejection, any temperature to 1; vote: the most frequent of the "
        "draws; tokens: one after the other, by their probabilities",
    )
    temperature: Temperature = 1.0
    draws: Count | None = Field(None, description="draws for a chunk, at most (exact, vote); 200 by default")
    top_k: Count | None = None
    top_p: Share | None = None
    seed: Seed | None = Field(None, description="drawn anew where there is none, and said in the answer")
    stop: Stop = Field((), description=f"at most {STOPS} texts, not part of the answer")
    stream: bool = False
    deadline: Deadline | None = Field(None, description="seconds from the request on")


Ask = TypeVar("Ask", bound=_Ask)


def parse(kind: type[Ask], body: bytes) -> Ask:
    """A request of its JSON; a Refusal (400) names the first field that is wrong."""
    try:
        return _parsed(kind, body)
    except RecursionError:  # in reading it, or in showing what it holds
        raise Refusal(400, "the body is nested too deeply", code="invalid_json") from None


def _parsed(kind: type[Ask], body: bytes) -> Ask:
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    except json.JSONDecodeError as error:
        what = f"{error.msg} at place {error.pos}"
        raise Refusal(400, f"the body is not JSON: {what}", code="invalid_json") from None
    except ValueError:  # Python's own limit
        most = sys.get_int_max_str_digits()
        raise Refusal(400, f"a number of the body has more than {most} digits", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is {shown(value)}, not a JSON object", code="invalid_json")
    _refuse_unknown(kind, value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a Refusal where a name is there twice: a proxy before this server may take the other value."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Refusal(400, f"{shown(name)} is there twice", field=name[:64], code="invalid_json")
        found[name] = value
    return found


def _refuse_unknown(kind: type[_Ask], value: dict[str, Any]) -> None:
    for name in value:
        if name not in kind.model_fields:
            near = get_close_matches(name[:64], kind.model_fields, n=1)
            hint = f"; is it {near[0]}?" if near else ""
            raise Refusal(400, f"{shown(name)} is no field of this endpoint{hint}", field=name[:64], code="unknown")


def _refusal(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_context=False)[0]
    # After the field's own name: the members of an Optional and the like, which are none of the request.
    place = [str(part) for part in first["loc"]]
    name = ".".join(place[:2]) if place[0] == "stream_options" else place[0]
    if first["type"] == "missing":
        return Refusal(400, f"{name} is missing", field=name, code="missing")
    said = "input should be null" if first["type"] == "none_required" else first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return Refusal(400, f"{name} {said}", field=name)
    return Refusal(400, f"{name} = {shown(first['input'])}: {said[:1].lower()}{said[1:]}", field=name)
