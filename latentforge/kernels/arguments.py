"""What an argument of the operators may be: its type and its range, or a RefusedError that names it and its value."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError

# Within these a number, its square and the products of a row's factors are normal numbers of fp32.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-4, 1e4
SMALLEST, LARGEST = 1e-12, 1e12

_INT64 = 1 << 63


def shown(value: Any) -> str:
    """A value as a message shows it: short, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    try:
        said = repr(value)
    except Exception as error:  # of a number with more digits than Python prints, and of strange objects
        return f"a {type(value).__name__} ({type(error).__name__} where it is printed)"
    return said if len(said) <= 100 else said[:100] + "..."


def check_number(name: str, value: Any, low: float, high: float, what: str, *, next: str | None = None) -> None:
    """Refuse what is no real number from ``low`` to ``high``; ``what`` says in words what it should be.

    Python's and numpy's numbers and tensors of one number are taken; truth values are not, nor what wants a gradient.
    """
    if not _is_real(value) or not low <= value <= high:
        raise RefusedError(f"{name} = {shown(value)} is not {what}", next=next)


def check_positive(name: str, value: Any, *, next: str | None = None) -> None:
    """Refuse what is no positive number."""
    check_number(name, value, SMALLEST, LARGEST, f"a positive number (from {SMALLEST:g} to {LARGEST:g})", next=next)


def check_temperature(name: str, value: Any) -> None:
    """Refuse what is no temperature of a distribution."""
    said = f"a positive number (from {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g})"
    check_number(name, value, LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE, said)


def check_whole(
    name: str, value: Any, what: str, *, low: int = -_INT64, high: int = _INT64 - 1, next: str | None = None
) -> None:
    """Refuse what is no whole number from ``low`` to ``high``: numpy's are taken, 2.0 and truth values are not."""
    whole = isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise RefusedError(f"{name} = {shown(value)} is not {what}", next=next)


def check_name(name: str, value: Any, names: tuple[str, ...]) -> None:
    """Refuse what is none of some words."""
    if not isinstance(value, str) or value not in names:
        raise RefusedError(f"{name} {shown(value)} is not one of {', '.join(names)}")


def check_dense(name: str, value: Any, what: str) -> None:
    """Refuse what is no tensor, or one without memory of its own (sparse); ``what`` says what it should be."""
    if not isinstance(value, Tensor):
        raise RefusedError(f"{name} = {shown(value)}, not {what}")
    if value.layout != torch.strided:
        raise RefusedError(f"{name} = {shown(value)} in the layout {value.layout}, not {what}")


def _is_real(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad and value.dtype != torch.bool and not value.is_complex()
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)
