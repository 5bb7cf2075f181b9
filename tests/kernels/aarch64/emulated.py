"""The extension as it runs on another processor: the same module for the caller, its kernels under qemu.

What Python hands to the extension are addresses and numbers. The tensors behind the addresses are sent along and come
back as the kernels left them, so any test of the cpu backend can be run on aarch64, with torch on this machine as the
judge.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import pickle
import resource
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from latentforge.kernels.native import native

_RECENT = 64  # storages whose address was asked for lately: they stay alive, so an address means one of them


def _without_core() -> None:
    """A planted crash leaves no file behind."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Recorded:
    """An object of the extension, such as ``KdCall``: what is done to it is written down and replayed over there."""

    def __init__(self, extension: Emulated, name: str) -> None:
        self.__dict__["_extension"], self.__dict__["_name"], self.__dict__["_steps"] = extension, name, []

    def __setattr__(self, name: str, value: Any) -> None:
        self._steps.append(("set", name, self._extension.located(value)))

    def __getattr__(self, name: str) -> Any:
        def method(*given: Any) -> None:
            self._steps.append(("call", name, [self._extension.located(one) for one in given]))

        return method


class Emulated(ModuleType):
    """Stands for ``latentforge._native``; ``command`` starts guest.py in the arm64 Python."""

    def __init__(self, command: list[str], library: str) -> None:
        super().__init__("latentforge._native")
        self.__file__ = library
        self._recent: deque[torch.UntypedStorage] = deque(maxlen=_RECENT)
        self._process = subprocess.Popen(
            [*command, library], stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=_without_core
        )
        self._members: dict[str, bool] = self._request(None, (), {}, [])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._members:
            raise AttributeError(f"the extension has no {name!r}")
        if self._members[name]:
            return lambda: Recorded(self, name)
        return lambda *positional, **named: self._call(name, positional, named)

    def located(self, value: Any) -> Any:
        """An address as (storage, offset), anything else as it is."""
        if isinstance(value, int) and not isinstance(value, bool):
            for storage in self._recent:
                offset = value - storage.data_ptr()
                if 0 <= offset < storage.nbytes():
                    return storage, offset
        return value

    def _call(self, name: str, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        storages: dict[int, torch.UntypedStorage] = {}

        def sent(value: Any) -> Any:
            if isinstance(value, Recorded):
                steps = [
                    (kind, key, [sent(v) for v in given] if kind == "call" else sent(given))
                    for kind, key, given in value._steps
                ]
                return "object", value._name, steps
            value = self.located(value)
            if isinstance(value, tuple) and isinstance(value[0], torch.UntypedStorage):
                storages.setdefault(value[0].data_ptr(), value[0])
                return "address", list(storages).index(value[0].data_ptr()), value[1]
            return value

        positional = tuple(sent(value) for value in positional)
        named = {key: sent(value) for key, value in named.items()}
        return self._request(name, positional, named, list(storages.values()))

    def _request(self, name: str | None, positional: Any, named: Any, storages: list[torch.UntypedStorage]) -> Any:
        memory = [(ctypes.string_at(one.data_ptr(), one.nbytes()), one.data_ptr()) for one in storages]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        frame = pickle.dumps((name, positional, named, memory), protocol=4)
        try:
            self._process.stdin.write(struct.pack("<Q", len(frame)) + frame)
            self._process.stdin.flush()
            head = self._process.stdout.read(8)
        except BrokenPipeError:
            head = b""
        if len(head) != 8:
            raise ProcessLookupError(f"the emulated process ended with {self._process.wait(30)} at {name}()")
        outcome, result, contents = pickle.loads(self._process.stdout.read(struct.unpack("<Q", head)[0]))
        if outcome != "ok":
            raise getattr(builtins, outcome, RuntimeError)(result)
        for storage, content in zip(storages, contents, strict=True):
            ctypes.memmove(storage.data_ptr(), content, storage.nbytes())
        return result

    def close(self) -> None:
        """End the emulated process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[Emulated]:
        """While this lasts, ``latentforge.kernels`` uses this extension."""
        own, address_of = sys.modules.get("latentforge._native"), torch.Tensor.data_ptr

        def data_ptr(tensor: torch.Tensor) -> int:
            self._recent.append(tensor.untyped_storage())
            return address_of(tensor)

        native.cache_clear()
        sys.modules["latentforge._native"] = self
        torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
        try:
            yield self
        finally:
            torch.Tensor.data_ptr = address_of  # type: ignore[method-assign]
            native.cache_clear()
            if own is None:
                del sys.modules["latentforge._native"]
            else:
                sys.modules["latentforge._native"] = own
