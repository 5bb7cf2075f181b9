"""A run's id follows from what the run means, and from nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.spec.canonical import canonical_bytes
from latentforge.spec.identity import RUN_ID, RunIdentity

HEX = "ab" * 32
_scalars = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8)
_scalars = _scalars | st.floats(allow_nan=False, allow_infinity=False)
_specs = st.dictionaries(st.text(max_size=6), st.recursive(_scalars, lambda v: st.lists(v, max_size=3), max_leaves=5))


def identity(**changes: Any) -> RunIdentity:
    base: dict[str, Any] = {
        "kind": "distill",
        "spec": {"seed": 7, "distill": {"steps": 500, "learning_rate": 1e-3}},
        "inputs": {"data": "run:data-" + "0" * 20},
        "code": HEX,
        "lock": HEX,
    }
    return RunIdentity(**{**base, **changes})


def _shuffled(value: Any, random: Any) -> Any:
    if isinstance(value, dict):
        items = list(value.items())
        random.shuffle(items)
        return {key: _shuffled(item, random) for key, item in items}
    return value


@given(spec=_specs, random=st.randoms(use_true_random=False))
def test_the_order_of_keys_never_changes_the_id(spec: dict[str, Any], random: Any) -> None:
    assert identity(spec=spec).run_id == identity(spec=_shuffled(spec, random)).run_id


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "score"},
        {"spec": {"seed": 8, "distill": {"steps": 500, "learning_rate": 1e-3}}},
        {"spec": {"seed": 7, "distill": {"steps": 500, "learning_rate": 1.5e-5}}},
        {"inputs": {"data": "run:data-" + "1" * 20}},
        {"code": "cd" * 32},
        {"lock": "cd" * 32},
        {"secrets": ("VENICE_API_KEY",)},
        {"attempt": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_part_of_the_meaning_changes_the_id(change: dict[str, Any]) -> None:
    assert identity(**change).run_id != identity().run_id


@given(spec=_specs)
def test_an_identity_survives_its_file(spec: dict[str, Any]) -> None:
    written = identity(spec=spec)
    read = RunIdentity.from_bytes(written.canonical, run_id=written.run_id)
    assert read.canonical == written.canonical
    assert RUN_ID.fullmatch(read.run_id)


@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_of_an_identity_is_refused(position: int, bit: int) -> None:
    content = bytearray(identity().canonical)
    content[position % len(content)] ^= 1 << bit
    with pytest.raises(RefusedError):
        RunIdentity.from_bytes(bytes(content), run_id=identity().run_id)


def test_an_identity_that_is_not_canonical_is_refused() -> None:
    spaced = json.dumps(identity().as_json(), indent=1).encode()
    with pytest.raises(RefusedError, match="canonical"):
        RunIdentity.from_bytes(spaced)


@pytest.mark.parametrize("part", ["spec", "inputs", "code", "lock", "secrets"])
@pytest.mark.parametrize("value", [7, [7], {"a": 7}, None, True])
def test_an_identity_whose_parts_have_another_shape_is_refused(part: str, value: Any) -> None:
    if part == "spec" and isinstance(value, dict):
        return
    content = canonical_bytes({**identity().as_json(), part: value})
    with pytest.raises(RefusedError, match=r"have to be|cannot be read|canonical"):
        RunIdentity.from_bytes(content)


@pytest.mark.parametrize("attempt", [0, -1, True, 1.5, "1", None])
def test_an_identity_of_no_attempt_is_refused(attempt: Any) -> None:
    with pytest.raises(RefusedError, match=r"attempt .* is no number from 1"):
        RunIdentity.from_bytes(canonical_bytes({**identity().as_json(), "attempt": attempt}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53])
def test_a_value_without_canonical_form_is_refused(value: float) -> None:
    with pytest.raises(RefusedError):
        canonical_bytes({"value": value})


def test_floats_are_written_as_rfc_8785_says() -> None:
    assert canonical_bytes([1.5e-5, 1e-7, 1.0, 1e21, 0.3]) == b"[0.000015,1e-7,1,1e+21,0.3]"


@pytest.mark.parametrize("attempt", [1, 2, 9, 10, 64])
def test_another_attempt_has_the_canonical_bytes_that_it_would_have_by_itself(attempt: int) -> None:
    for before in (identity(), identity().at_attempt(12)):
        other = before.at_attempt(attempt)
        assert other.canonical == canonical_bytes(other.as_json())
        assert other.attempt == attempt
