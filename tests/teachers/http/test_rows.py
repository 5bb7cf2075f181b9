"""A row is given only where the answer proves it: its ids, its position, its entries."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http.rows import Form, Question, parse_answer, request_body

from .wire import FORMS, VOCABULARY, answer, logits_of, question, truth

TOKENS = (5, 9, 12, 30, 9, 0, 39)
LOGITS = logits_of(len(TOKENS))


def refused(value: Any, asked: Question, form: Form) -> str:
    with pytest.raises(TeacherFailure) as caught:
        parse_answer(value, asked, form, url="http://gx10/v1")
    assert "gx10" in str(caught.value)
    return caught.value.kind


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 4, 20, VOCABULARY])
@pytest.mark.parametrize("last_generated", [False, True])
def test_rows_are_those_of_the_teachers_own_logits(form: Form, k: int, last_generated: bool) -> None:
    asked = question(TOKENS, k, last_generated=last_generated)
    found = parse_answer(json.loads(json.dumps(answer(asked, LOGITS, form))), asked, form).targets
    right = truth(LOGITS, k)
    assert np.array_equal(found.ids, right.ids)
    assert np.array_equal(found.logprobs, right.logprobs)
    outside = 1.0 - np.exp(right.logprobs.astype(np.float64)).sum(axis=1)
    if k < VOCABULARY:
        assert np.allclose(np.exp(found.tails[1.0].astype(np.float64)), outside, atol=1e-7)
        assert np.allclose(found.tails[1.0], right.tails[1.0], atol=1e-3)
    else:
        assert np.exp(found.tails[1.0]).max() < 1e-6


def test_the_question_holds_token_ids_and_never_text() -> None:
    whole = question((1, 2, 3), 7)
    assert request_body("m", whole, "prompt_logprobs")["prompt"] == [1, 2, 3]
    assert request_body("m", whole, "prompt_logprobs")["prompt_logprobs"] == 7
    echoed = request_body("m", question((1, 2, 3), 7, last_generated=True), "echo")
    assert (echoed["prompt"], echoed["echo"], echoed["return_tokens_as_token_ids"]) == ([1, 2], True, True)


@pytest.mark.parametrize("form", FORMS)
def test_equal_log_probabilities_stand_by_ascending_id(form: Form) -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, [31, 8, 17]] = 2.0
    asked = question((0, 8, 17), 3)
    found = parse_answer(answer(asked, logits, form), asked, form).targets
    assert found.ids.tolist() == [[8, 17, 31], [8, 17, 31]]


def test_ids_of_padding_count_as_outside() -> None:
    logits = LOGITS.clone()
    logits[:, 38:] = -30.0
    logits[1, 38] = 9.0
    asked = question((1, 2, 3, 4, 5, 6, 7), 3, vocab_size=38)
    found = parse_answer(answer(asked, logits, "prompt_logprobs"), asked, "prompt_logprobs")
    assert found.padding == 1
    assert found.targets.ids[1, 2] == -1
    assert np.isneginf(found.targets.logprobs[1, 2])
    assert np.exp(found.targets.tails[1.0][1]) > 0.5
    assert (found.targets.ids[[0, 2, 3, 4, 5]] >= 0).all()


def test_a_server_that_counts_the_documents_token_among_the_k_is_noticed() -> None:
    asked = question(TOKENS, 4)
    value = answer(asked, LOGITS, "echo")
    lists = value["choices"][0]["logprobs"]
    for at, token in enumerate(TOKENS[1:], start=1):
        own = f"token_id:{token}"
        best = sorted(lists["top_logprobs"][at].items(), key=lambda item: -item[1])
        lists["top_logprobs"][at] = dict([*[entry for entry in best if entry[0] != own][:3], (own, -20.0)])
        lists["token_logprobs"][at] = -20.0
    assert parse_answer(value, asked, "echo").own_inside == len(TOKENS) - 1
    value = answer(asked, LOGITS, "prompt_logprobs")
    row = value["choices"][0]["prompt_logprobs"][1]
    del row[max(row, key=lambda key: row[key]["logprob"])]
    assert refused(value, asked, "prompt_logprobs") == "too-few", "its ranks say that the first one is missing"


def damaged(form: Form, name: str) -> dict[str, Any]:
    value = answer(question(TOKENS, 4), LOGITS, form)
    choice = value["choices"][0]
    holder = choice if form == "prompt_logprobs" else choice["logprobs"]
    field = "prompt_logprobs" if form == "prompt_logprobs" else "top_logprobs"
    rows = holder[field]
    row = rows[3]
    key = next(iter(row))

    def spoil(number: Any) -> None:
        row[key] = {**row[key], "logprob": number} if isinstance(row[key], dict) else number

    if name == "late":
        holder[field] = [None, rows[-1], *rows[1:-1]]
    elif name == "early":
        holder[field] = [None, *rows[2:], rows[1]]
    elif name == "row before the first":
        holder[field] = [rows[1], *rows[1:]]
    elif name == "second row missing":
        holder[field] = [None, None, *rows[2:]]
    elif name == "one row less":
        holder[field] = rows[:-2]
    elif name == "own token missing":
        wanted = str(TOKENS[3]) if form == "prompt_logprobs" else f"token_id:{TOKENS[3]}"
        row["33" if form == "prompt_logprobs" else "token_id:33"] = row.pop(wanted)
    elif name == "keyed by text":
        row["the"] = row.pop(key)
    elif name == "keyed by a number spelt twice":
        row["007" if form == "prompt_logprobs" else "token_id:007"] = row.pop(key)
    elif name == "fewer":
        holder[field] = [None, *[dict(sorted(r.items(), key=str)[:3]) for r in rows[1:]]]
    elif name == "nan":
        spoil(math.nan)
    elif name == "minus infinity":
        spoil(-math.inf)
    elif name == "positive":
        spoil(0.5)
    elif name == "more mass than one":
        for other in row:
            row[other] = {**row[other], "logprob": -0.1} if isinstance(row[other], dict) else -0.1
        if form == "echo":
            holder["token_logprobs"][3] = -0.1
    elif name == "id beyond the model":
        row[key.replace(key.rpartition(":")[2], "40")] = row[key]
    elif name == "text for a number":
        spoil("-1.0")
    elif name == "no rows":
        holder[field] = None
    elif name == "two choices":
        value["choices"] *= 2
    return value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("late", {"shifted"}),
        ("early", {"shifted"}),
        ("row before the first", {"shifted"}),
        ("second row missing", {"shifted"}),
        ("one row less", {"wrong-ids", "malformed"}),
        ("own token missing", {"wrong-ids"}),
        ("keyed by text", {"collapsed"}),
        ("keyed by a number spelt twice", {"collapsed"}),
        ("fewer", {"too-few"}),
        ("nan", {"not-finite"}),
        ("minus infinity", {"not-finite"}),
        ("positive", {"not-finite"}),
        ("more mass than one", {"not-finite"}),
        ("id beyond the model", {"wrong-ids"}),
        ("text for a number", {"malformed"}),
        ("no rows", {"no-logprobs"}),
        ("two choices", {"malformed"}),
    ],
)
def test_each_damage_is_refused_as_what_it_is(form: Form, name: str, kinds: set[str]) -> None:
    assert refused(damaged(form, name), question(TOKENS, 4), form) in kinds
    parse_answer(damaged(form, "none"), question(TOKENS, 4), form)  # the control: what is not damaged is given


def test_an_echo_whose_own_log_probabilities_are_a_position_late_is_refused() -> None:
    value = answer(question(TOKENS, 4), LOGITS, "echo")
    lists = value["choices"][0]["logprobs"]
    lists["token_logprobs"] = [None, None, *lists["token_logprobs"][1:-1]]
    assert refused(value, question(TOKENS, 4), "echo") in {"shifted", "malformed"}
    lists["token_logprobs"][1] = -2.0
    assert refused(value, question(TOKENS, 4), "echo") == "shifted"


@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_puts_a_token_before_the_document_is_refused(form: Form) -> None:
    longer = question((1, *TOKENS), 4)
    value = answer(longer, logits_of(len(TOKENS) + 1), form)
    assert refused(value, question(TOKENS, 4), form) == "wrong-ids"


@pytest.mark.parametrize("form", FORMS)
def test_ids_that_were_read_otherwise_are_refused_even_where_every_row_holds_every_token(form: Form) -> None:
    asked = question(TOKENS, VOCABULARY)
    value = answer(asked, LOGITS, form)
    choice = value["choices"][0]
    if form == "echo":
        choice["logprobs"]["tokens"][2] = "token_id:13"
    else:
        choice["prompt_token_ids"][2] = 13
    assert refused(value, asked, form) == "wrong-ids"


def test_a_generated_row_that_is_another_position_is_refused() -> None:
    asked = question(TOKENS, 4, last_generated=True)
    value = answer(asked, LOGITS, "prompt_logprobs")
    top = value["choices"][0]["logprobs"]["top_logprobs"]
    top[0] = {key: number - 1.0 if at == 0 else number for at, (key, number) in enumerate(top[0].items())}
    assert refused(value, asked, "prompt_logprobs") == "shifted"


NAMES = st.sampled_from(
    ["choices", "prompt_logprobs", "prompt_token_ids", "logprobs", "tokens", "token_logprobs", "top_logprobs", "5", "9"]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(value=anything, form=st.sampled_from(FORMS), last=st.booleans())
@settings(max_examples=100)
def test_random_json_never_gives_a_row(value: Any, form: Form, last: bool) -> None:
    for whole in (value, {"choices": [value]}, {"choices": [{"logprobs": value, "prompt_logprobs": value}]}):
        with pytest.raises(TeacherFailure):
            parse_answer(whole, question((5, 9, 12), 2, last_generated=last), form)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as a path."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def wrong(value: Any) -> st.SearchStrategy[Any]:
    """Values that cannot be what stood there: another type, no number, another id."""
    if isinstance(value, float):
        return st.sampled_from([None, "x", True, math.nan, math.inf, -math.inf, 0.7, [], {}, 10**400])
    return st.sampled_from([None, "x", "7", -1, 41, 10**400, math.nan, [], {}, [1], {"a": 1}])


@given(data=st.data(), form=st.sampled_from(FORMS), last=st.booleans(), k=st.integers(1, 6))
@settings(max_examples=100)
def test_an_answer_that_is_damaged_anywhere_gives_the_right_rows_or_none(
    data: st.DataObject, form: Form, last: bool, k: int
) -> None:
    asked = question(TOKENS, k, last_generated=last)
    value = copy.deepcopy(answer(asked, LOGITS, form))
    path = data.draw(st.sampled_from(places(value)[1:]))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    # A server without ranks that leaves out one entry beside the document's own cannot be told from one whose k-th is
    # the document's own: only whole rows of k + 1 show it, and the probe asks for one.
    if isinstance(holder[path[-1]], float) or data.draw(st.booleans()):
        holder[path[-1]] = data.draw(wrong(holder[path[-1]]))
    else:
        del holder[path[-1]]
    right = truth(LOGITS, k)
    try:
        found = parse_answer(value, asked, form).targets
    except TeacherFailure:
        return
    assert np.array_equal(found.ids, right.ids)
    assert np.array_equal(found.logprobs, right.logprobs)


def test_a_number_beyond_fp32_is_not_taken_for_an_absent_entrys() -> None:
    asked = question(TOKENS, 4)
    value = json.loads(json.dumps(answer(asked, LOGITS, "prompt_logprobs")))
    row = value["choices"][0]["prompt_logprobs"][2]
    row[next(iter(row))]["logprob"] = -1e308
    assert refused(value, asked, "prompt_logprobs") == "not-finite"


def test_an_error_that_comes_with_status_200_is_quoted() -> None:
    value = {"error": {"message": "Rate limit reached for tiny", "code": 429}}
    with pytest.raises(TeacherFailure, match="Rate limit reached for tiny"):
        parse_answer(value, question(TOKENS, 4), "echo", url="http://gx10/v1")
