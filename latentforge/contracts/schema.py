"""The shape of a contract file. Unknown keys are errors at every level: a dropped key once hid 619 unbound tests."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from latentforge.verdicts import FALSIFIER_ID

CHECK = re.compile(r"(?:latentforge|dispatch)(?:\.[A-Za-z_]\w*)+:[A-Za-z_]\w*")

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
FalsifierId = Annotated[str, Field(pattern=rf"^{FALSIFIER_ID.pattern}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Function = Annotated[str, Field(pattern=rf"^{CHECK.pattern}$")]
Word = Annotated[str, Field(pattern=r"^[^\s\p{C}]+$")]
"""The name of an event's field: it stands in lines for people."""
Scalar = bool | int | float | str
NOT_FINITE = ("nan", "inf", "-inf")
"""How events write the numbers that JSON lacks."""
EventKind = Literal["phase", "step", "metric", "checkpoint", "compile", "memory", "warning", "verdict", "end"]
ARCHITECTURE = "x86_64|aarch64|arm64|sm_[0-9]{2,3}[a-z]?"
Architecture = Annotated[str, Field(pattern=f"^({ARCHITECTURE})$")]


class Part(BaseModel):
    """A mapping of a contract file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Scope(Part):
    """Where a verdict holds. Outside it a falsifier is not run and its UNKNOWN does not count.

    ``arch`` names processors (``x86_64``, ``aarch64``) or GPU architectures (``sm_121``), ``device`` a kind of device,
    ``package`` what an extra of LatentForge installs, ``tool`` a program of the machine: a C++ compiler (``CXX``, or
    g++).
    """

    arch: Literal["any"] | list[Architecture] = "any"
    device: Literal["any", "cpu", "cuda"] = "any"
    profile: Literal["any", "smoke", "full"] = "any"
    package: Literal["any", "deepspeed"] = "any"
    tool: Literal["any", "c++"] = "any"

    def unmet(self, *, arch: str, gpus: Sequence[str]) -> str | None:
        """Why this machine (processor, GPU architectures, packages) is outside the scope; None where it is inside."""
        if self.package != "any" and importlib.util.find_spec(self.package) is None:
            return f"needs {self.package}, which is not installed"
        if self.tool == "c++" and shutil.which(os.environ.get("CXX", "g++")) is None:
            return "needs a C++ compiler, and there is none"
        if self.device == "cuda" and not gpus:
            return "needs a GPU"
        if self.arch != "any" and not {arch, *gpus} & set(self.arch):
            return f"needs {' or '.join(self.arch)}"
        return None


class Equation(Part):
    """A formula and where it comes from."""

    id: Name
    formula: Text
    source: Text


_LARGEST = 2**53
TAGS = ("<function>", "<events>", "<precondition>")
"""Which kind of check one is, as it stands in the location of a problem; not in the file."""


class EventCheck(Part):
    """A check that is a predicate over the events of a run.

    Of the events of ``kind`` whose fields are as ``where`` says, ``every`` one, ``some`` one, ``none`` or the ``last``
    has in ``field`` what compares so with ``value``, or with the event's own field ``other``. ``events`` names a
    function that makes the events of a run on this machine; ``of`` the kinds of run that the predicate is about.
    """

    events: Function
    of: Annotated[list[Name], Field(min_length=1)]
    kind: EventKind
    where: dict[Word, Scalar] = {}
    quantifier: Literal["every", "some", "none", "last"]
    field: Word
    comparison: Literal["<", "<=", "=", "!=", ">=", ">"]
    value: Scalar | None = None
    other: Word | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.value is None) == (self.other is None):
            raise ValueError("either value or other is what the field is compared with")
        if isinstance(self.value, bool | str) and self.comparison not in ("=", "!="):
            raise ValueError(f"{self.value!r} is no number: it is equal or not, neither more nor less")
        if self.value in NOT_FINITE:
            raise ValueError(f"nothing compares with {self.value}: it is no finite number")
        return self

    def __str__(self) -> str:
        chosen = "".join(f" {name}={value}" for name, value in self.where.items())
        against = self.other if self.other is not None else self.value
        return f"{self.quantifier} {self.kind}{chosen}: {self.field} {self.comparison} {against}"


class Precondition(Part):
    """A check that a parameter is taken within its bounds and refused outside them.

    ``accepts`` names a function that is given the value (and ``with``) and raises a refusal or ValueError where it does
    not take it. What is probed follows from the type and the bounds: both sides of each bound, and what is no number.
    """

    accepts: Function
    type: Literal["number", "whole"]
    above: int | float | None = None
    at_least: int | float | None = None
    below: int | float | None = None
    at_most: int | float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if (self.above is None) == (self.at_least is None):
            raise ValueError("either above or at_least is the lower bound")
        if self.below is not None and self.at_most is not None:
            raise ValueError("below and at_most are both an upper bound")
        bounds = [one for one in (self.above, self.at_least, self.below, self.at_most) if one is not None]
        if any(abs(one) > _LARGEST for one in bounds):
            raise ValueError(f"a bound is at most {_LARGEST} either way: beyond it not every whole number is a float")
        if self.type == "whole" and not all(isinstance(one, int) for one in bounds):
            raise ValueError("the bounds of whole numbers are whole")
        low, high = bounds[0], bounds[-1]
        tried = (low, low + 1) if self.type == "whole" else (low, low + 1, (low + high) / 2)
        if not any(self.holds(one) for one in tried):
            raise ValueError("no value is within the bounds")
        return self

    def holds(self, value: int | float) -> bool:
        """Whether a number is within all bounds."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        names = ("above", "at_least", "below", "at_most")
        said = [f"{name} {value:g}" for name in names if (value := getattr(self, name)) is not None]
        return f"{self.accepts} takes a {self.type} {', '.join(said)}"


def _tag_of(value: Any) -> str:
    if isinstance(value, Precondition) or (isinstance(value, dict) and "accepts" in value):
        return TAGS[2]
    return TAGS[isinstance(value, dict | EventCheck)]


class Control(Part):
    """A planted fault: arguments with which the same function must fail, or, for a predicate over events, fields that
    are put into the events that it looks at (of ``some`` into all of them, otherwise into the last)."""

    name: Text
    arguments: Annotated[dict[str, Any], Field(min_length=1)] | None = Field(None, alias="with")
    change: Annotated[dict[Word, Scalar], Field(min_length=1)] | None = None


class Falsifier(Part):
    """A statement that can turn out false, the check that would show it, and the control that shows the check."""

    id: FalsifierId
    statement: Text
    prediction: Text
    check: Annotated[
        Annotated[Function, Tag(TAGS[0])] | Annotated[EventCheck, Tag(TAGS[1])] | Annotated[Precondition, Tag(TAGS[2])],
        Discriminator(lambda value: _tag_of(value)),
    ]
    arguments: dict[str, Any] = Field({}, alias="with")
    control: Control
    if_fails: Text
    scope: Scope | None = None

    @model_validator(mode="after")
    def _control_is_planted(self) -> Self:
        if isinstance(self.check, EventCheck):
            if self.control.change is None or self.control.arguments is not None:
                raise ValueError(f"the control of {self.id} plants into events: it has change, and nothing else")
        elif self.control.arguments is None or self.control.change is not None:
            raise ValueError(f"the control of {self.id} plants arguments: it has with, and nothing else")
        elif self.control_arguments == self.arguments:
            raise ValueError(f"the control of {self.id} has the arguments of the check: nothing is planted")
        return self

    @property
    def function(self) -> str:
        """``module:function`` that is called: the check's own, or that of its events."""
        if isinstance(self.check, EventCheck):
            return self.check.events
        return self.check.accepts if isinstance(self.check, Precondition) else self.check

    @property
    def control_arguments(self) -> dict[str, Any]:
        """The arguments of the control run: those of the check with the planted ones over them."""
        return {**self.arguments, **(self.control.arguments or {})}


class Contract(Part):
    """One contract file: claims about one subject, with the falsifiers that could refute them."""

    contract: Name
    version: Annotated[int, Field(ge=1)]
    title: Text
    description: Text
    references: Annotated[list[Text], Field(min_length=1)]
    depends_on: list[Name] = []
    supersedes: list[FalsifierId] = []
    scope: Scope = Scope()
    equations: list[Equation] = []
    falsifiers: Annotated[list[Falsifier], Field(min_length=1)]

    @model_validator(mode="after")
    def _ids_differ(self) -> Self:
        for what, ids in (
            ("falsifier", [falsifier.id for falsifier in self.falsifiers]),
            ("equation", [equation.id for equation in self.equations]),
            ("supersedes", self.supersedes),
            ("depends_on", self.depends_on),
        ):
            twice = sorted({one for one in ids if ids.count(one) > 1})
            if twice:
                raise ValueError(f"{what} {twice[0]} stands twice")
        own = {falsifier.id for falsifier in self.falsifiers} & set(self.supersedes)
        if own:
            raise ValueError(f"supersedes names this contract's own falsifier {min(own)}")
        if self.contract in self.depends_on:
            raise ValueError("depends_on names this contract itself")
        return self

    def scope_of(self, falsifier: Falsifier) -> Scope:
        """The falsifier's own scope, else the contract's."""
        return falsifier.scope or self.scope
