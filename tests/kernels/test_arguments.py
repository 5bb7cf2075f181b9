"""Every argument of the operators takes what it says and refuses everything else, by its name and its value."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.kernels import DenseTargets, Int8Weight, LinearTargets, kd_loss, latent_decode, linear_kd_loss
from latentforge.kernels.arguments import shown
from latentforge.kernels.targets import TopKTargets, topk_targets

N, V, H = 3, 11, 4
LOSS: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7, "denominator": 3.0}
GENERATOR = torch.Generator().manual_seed(5)
HIDDEN, WEIGHT, LOGITS = (torch.randn(*s, generator=GENERATOR) for s in ((N, H), (V, H), (N, V)))
LABELS, TEACHER = torch.arange(N), DenseTargets(torch.randn(N, V, generator=GENERATOR))
OPERATORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "kd_loss": (kd_loss, {"student_logits": LOGITS, "targets": TEACHER, "labels": LABELS} | LOSS),
    "linear_kd_loss": (
        linear_kd_loss,
        {"hidden": HIDDEN, "weight": WEIGHT, "targets": TEACHER, "labels": LABELS} | LOSS,
    ),
    "latent_decode": (
        latent_decode,
        {"hidden": HIDDEN, "weight": WEIGHT, "temperature": 0.7, "seeds": LABELS, "positions": LABELS},
    ),
}
ARGUMENTS = [(op, name) for op, (call, _) in OPERATORS.items() for name in inspect.signature(call).parameters]
OPTIONAL = {"teacher_temperature", "bias", "soft_cap", "chunk_rows", "top_k", "top_p", "vocab"}


def is_real(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.shape == () and value.dtype in (torch.float32, torch.int64) and not value.requires_grad
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


# What each argument that is no tensor takes, in words of this test's own.
TAKES: dict[str, Callable[[Any], bool]] = {
    "temperature": lambda v: is_real(v) and 1e-4 <= v <= 1e4,
    "teacher_temperature": lambda v: is_real(v) and 1e-4 <= v <= 1e4,
    "ce_weight": lambda v: is_real(v) and 0 <= v <= 1e12,
    "kd_weight": lambda v: is_real(v) and 0 <= v <= 1e12,
    "denominator": lambda v: is_real(v) and 1e-12 <= v <= 1e12,
    "logit_scale": lambda v: is_real(v) and 1e-12 <= v <= 1e12,
    "soft_cap": lambda v: is_real(v) and 1e-12 <= v <= 1e12,
    "beta": lambda v: is_real(v) and 0 <= v <= 1,
    "top_p": lambda v: is_real(v) and 1e-30 <= v <= 1,
    "ignore_index": lambda v: is_whole(v) and -(2**63) <= v < 2**63,
    "chunk_rows": lambda v: is_whole(v) and 1 <= v < 2**63,
    "top_k": lambda v: is_whole(v) and 1 <= v < 2**63,
    "vocab": lambda v: is_whole(v) and 1 <= v <= V,
    "direction": lambda v: isinstance(v, str) and v in ("forward", "reverse", "jsd"),
    "backend": lambda v: isinstance(v, str) and v in ("auto", "reference", "cpu"),
}
TENSORS = {"student_logits", "hidden", "weight", "targets", "labels", "bias", "seeds", "positions"}

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 13),
    st.sampled_from([10**400, 2**63, 2**63 - 1, 2**64, -(2**63), 10**12]),
    st.floats(),
    st.floats(0.25, 4.0),
    st.integers(-2, 12).map(float),
    st.sampled_from([1e-5, 1e5, 1e13, 1e38, 1e39, 1e200, 1e308, 5e-324, 1e-46, -0.0]),
    st.text(max_size=5),
    st.sampled_from(["forward", "reverse", "jsd", "auto", "cpu", "reference", "2", "nan", "CPU"]),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.decimals(),
    st.fractions(),
    st.lists(st.floats(), max_size=2),
    st.dictionaries(st.text(max_size=1), st.integers(), max_size=1),
    st.builds(np.int64, st.integers(-3, 13)),
    st.builds(np.uint8, st.integers(0, 13)),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.float64, st.floats()),
    st.builds(np.bool_, st.booleans()),
    st.builds(np.array, st.lists(st.floats(), max_size=2)),
    st.builds(torch.tensor, st.floats(width=32) | st.integers(-3, 13) | st.booleans()),
    st.sampled_from(
        [torch.ones(1), torch.ones(2), torch.ones((), requires_grad=True), torch.tensor(1j), object, print]
    ),
)


def call(op: str, name: str, value: Any) -> Any:
    function, good = OPERATORS[op]
    given = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in good.items()} | {name: value}
    return function(**given)


def takes(op: str, name: str, value: Any) -> bool:
    if value is None and name in OPTIONAL:
        return True
    if op == "latent_decode" and name == "temperature" and is_real(value) and value == 0:
        return True
    return name in TAKES and bool(TAKES[name](value))


def test_every_argument_is_among_those_that_are_tried() -> None:
    assert {name for _, name in ARGUMENTS} == TENSORS | set(TAKES)


@settings(max_examples=700)
@given(argument=st.sampled_from(ARGUMENTS), value=anything)
def test_an_argument_is_taken_or_refused_by_its_name_and_value(argument: tuple[str, str], value: Any) -> None:
    op, name = argument
    if takes(op, name, value):
        call(op, name, value)
        return
    with pytest.raises(RefusedError) as refusal:
        call(op, name, value)
    said = str(refusal.value)
    assert name.split("_")[-1] in said
    shape = value.shape if isinstance(value, torch.Tensor) else torch.Size([1, 2, 3])
    values = [shown(value), type(value).__name__, str(tuple(shape)), str(list(shape)), "no targets"]
    assert any(each in said for each in values)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in ARGUMENTS if name in TENSORS])
def test_a_tensor_of_the_wrong_kind_is_refused_by_its_name(op: str, name: str) -> None:
    good = OPERATORS[op][1].get(name, torch.zeros(V))
    shape = (N, V) if name == "targets" else good.shape
    for wrong in (
        torch.zeros(shape, dtype=torch.complex64),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.float16),
        torch.zeros(shape).to_sparse(),
        torch.zeros(*shape, 1),
        torch.zeros(()),
        torch.zeros(shape, device="meta"),
        np.zeros(shape),
        [[0.0]],
    ):
        with pytest.raises(RefusedError, match=rf"{name.split('_')[-1]}|on meta"):
            call(op, name, wrong)


@pytest.mark.parametrize("junk", [None, 3, "x", np.zeros((N, V)), torch.zeros(N, V).to_sparse(), torch.zeros(())])
def test_what_is_no_tensor_inside_of_the_targets_is_refused(junk: Any) -> None:
    top = topk_targets(LOGITS, 2, 2.0)
    layer = {"hidden": HIDDEN, "weight": WEIGHT}
    every: list[Any] = [DenseTargets(junk)]
    every += [TopKTargets(*(junk if i == j else t for j, t in enumerate(vars(top).values()))) for i in range(3)]
    every += [LinearTargets(**(layer | {name: junk})) for name in ("hidden", "weight", "bias")][
        : 2 if junk is None else 3
    ]
    for targets in every:
        with pytest.raises(RefusedError, match=r"teacher|top-k"):
            call("linear_kd_loss", "targets", targets)
    with pytest.raises(RefusedError, match="values"):
        Int8Weight(junk, torch.ones(V))
    with pytest.raises(RefusedError, match="scales"):
        Int8Weight(torch.zeros(V, H, dtype=torch.int8), junk)


@given(name=st.sampled_from(["logit_scale", "soft_cap"]), value=anything)
@settings(max_examples=200)
def test_a_teachers_scale_and_cap_obey_the_rules_of_the_students(name: str, value: Any) -> None:
    more: dict[str, Any] = {name: value}
    if takes("linear_kd_loss", name, value):
        call("linear_kd_loss", "targets", LinearTargets(HIDDEN, WEIGHT, **more))
        return
    with pytest.raises(RefusedError, match=f"teacher {name}"):
        call("linear_kd_loss", "targets", LinearTargets(HIDDEN, WEIGHT, **more))


@pytest.mark.parametrize("as_another", [np.float64, np.float32, Fraction, torch.tensor])
def test_a_number_is_the_same_number_whoever_made_it(as_another: Callable[[float], Any]) -> None:
    exact = {"temperature": 2.0, "ce_weight": 0.25, "kd_weight": 0.75, "denominator": 4.0, "soft_cap": 8.0}
    wanted = kd_loss(LOGITS.clone(), TEACHER, LABELS, **exact)  # type: ignore[arg-type]
    found = kd_loss(LOGITS.clone(), TEACHER, LABELS, **{k: as_another(v) for k, v in exact.items()})
    assert torch.equal(torch.stack(wanted), torch.stack(found))
    keys = {"seeds": LABELS, "positions": LABELS, "temperature": 0.5}
    cut = latent_decode(HIDDEN, WEIGHT, top_k=np.int32(2), vocab=np.int64(9), **keys)  # type: ignore[arg-type]
    assert torch.equal(cut.ids, latent_decode(HIDDEN, WEIGHT, top_k=2, vocab=9, **keys).ids)  # type: ignore[arg-type]


def test_the_extremes_of_what_is_taken_make_finite_numbers() -> None:
    for temperature in (1e-4, 1e4):
        for weight in (0.0, 1e-300, 1e12):
            for denominator in (1e-12, 1e12):
                logits = LOGITS.clone().requires_grad_() * 1
                logits.retain_grad()
                changed = {"temperature": temperature, "kd_weight": weight, "denominator": denominator}
                found = kd_loss(logits, TEACHER, LABELS, **(LOSS | changed))
                found.loss.backward()
                assert found.loss.isfinite()
                assert logits.grad is not None
                assert logits.grad.isfinite().all()


def test_a_message_stays_short_and_can_always_be_made() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    for value in (Rude(), 10**10000, "x" * 10000, torch.zeros(100, 100), Decimal(2)):
        with pytest.raises(RefusedError, match="temperature = ") as refusal:
            call("kd_loss", "temperature", value)
        assert len(str(refusal.value)) < 250
