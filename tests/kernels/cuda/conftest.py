"""The CUDA kernels' logic on the host: the emulation is built once, and run on buffers between forbidden pages."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from ctypes import c_bool, c_double, c_int, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentforge.kernels.cuda import decode as cuda_decode
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets
from latentforge.kernels.weights import Int8Weight

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent / "emulation"


class LogitsC(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("row_stride", c_int64), ("bf16", c_bool))


class KdCallC(ctypes.Structure):
    """``latentforge::cuda::KdCall`` (csrc/cuda/kd_call.h)."""

    _fields_ = (
        ("rows", c_int64),
        ("vocab", c_int64),
        ("student", LogitsC),
        ("teacher", LogitsC),
        ("topk_ids", c_void_p),
        ("ids_are_64_bit", c_bool),
        ("topk_logprobs", c_void_p),
        ("topk_tail", c_void_p),
        ("k", c_int64),
        ("labels", c_void_p),
        ("ignore_index", c_int64),
        ("bias", c_void_p),
        ("temperature", c_double),
        ("teacher_temperature", c_double),
        ("ce_scale", c_double),
        ("kd_scale", c_double),
        ("logit_scale", c_double),
        ("soft_cap", c_double),
        ("reverse", c_bool),
        ("write_gradient", c_bool),
        ("ce_rows", c_void_p),
        ("kd_rows", c_void_p),
        ("workspace", c_void_p),
    )


class DecodeCallC(ctypes.Structure):
    """``latentforge::cuda::DecodeCall`` (csrc/cuda/decode_call.h)."""

    _fields_ = (
        ("rows", c_int64),
        ("width", c_int64),
        ("vocab", c_int64),
        ("hidden", c_void_p),
        ("hidden_stride", c_int64),
        ("weight", c_void_p),
        ("weight_stride", c_int64),
        ("weight_type", c_int),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("seeds", c_void_p),
        ("positions", c_void_p),
        ("temperature", c_double),
        ("logit_scale", c_double),
        ("soft_cap", c_double),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("ids", c_void_p),
        ("logprobs", c_void_p),
        ("workspace", c_void_p),
    )


class EmulationError(Exception):
    """What the emulated device noticed."""


@dataclass(frozen=True)
class Place:
    """How the buffers lie and in which order the device works; none of it may change a bit."""

    student_shift: int = 0  # elements past a 16-byte boundary
    teacher_shift: int = 0
    gap: int = 0  # columns between rows
    order: int = 0
    multiprocessors: int = 2
    cache_bytes: int = 1 << 16


class Emulation:
    """The kernels of one build; ``flags`` plant a fault."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.lf_allocate.restype = c_void_p
        self.library.lf_allocate.argtypes = (c_size_t, c_size_t)
        self.library.lf_overrun.argtypes = (c_void_p,)
        self.library.lf_release.argtypes = (c_void_p,)
        self.library.lf_size_of_kd_call.restype = c_size_t
        self.library.lf_kd_workspace_bytes.restype = c_int64
        self.library.lf_kd_rows.argtypes = (c_void_p, c_int, c_int64, c_uint64, ctypes.c_char_p, c_int)
        self.library.lf_size_of_decode_call.restype = c_size_t
        self.library.lf_decode_workspace_bytes.restype = c_int64
        self.library.lf_decode.argtypes = (c_void_p, c_int, c_uint64, ctypes.c_char_p, c_int)
        assert self.library.lf_size_of_kd_call() == ctypes.sizeof(KdCallC)
        assert self.library.lf_size_of_decode_call() == ctypes.sizeof(DecodeCallC)
        self._held: list[tuple[int, str]] = []

    def _buffer(self, count: int, dtype: torch.dtype, shift: int = 0, name: str = "") -> tuple[int, Tensor]:
        size = torch.empty(0, dtype=dtype).element_size()
        address = self.library.lf_allocate(max(count, 1) * size, shift * size)
        self._held.append((address, name))
        memory = (ctypes.c_char * (max(count, 1) * size)).from_address(address)
        return address, torch.frombuffer(memory, dtype=dtype, count=max(count, 1))[:count]

    def put(self, tensor: Tensor, shift: int = 0, gap: int = 0, name: str = "") -> tuple[int, Tensor]:
        """A copy between forbidden pages, rows ``gap`` further apart; (address, the tensor there)."""
        if tensor.dim() < 2:
            address, memory = self._buffer(tensor.numel(), tensor.dtype, shift, name)
            memory.copy_(tensor.flatten())
            return address, memory
        rows, columns = tensor.shape
        stride = columns + gap
        count = max((rows - 1) * stride + columns, 0)
        address, memory = self._buffer(count, tensor.dtype, shift, name)
        if tensor.is_floating_point():
            memory.fill_(torch.nan)
        view = memory.as_strided((rows, columns), (stride, 1))
        view.copy_(tensor)
        return address, view

    def finish(self, failed: int, error: ctypes.Array[ctypes.c_char]) -> None:
        """Raise what was noticed, in the run or around the buffers."""
        overrun = [name for address, name in self._held if self.library.lf_overrun(address)]
        for address, _ in self._held:
            self.library.lf_release(address)
        self._held = []
        if failed:
            raise EmulationError(error.value.decode())
        if overrun:
            raise EmulationError(f"wrote outside: {', '.join(overrun)}")

    def row_losses(
        self,
        student: Tensor,
        targets: Targets | None,
        labels: Tensor | None,
        settings: KDSettings,
        *,
        bias: Tensor | None = None,
        write_gradient: bool = True,
        place: Place | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(ce [N], kd [N], what stands where the student's logits were)."""
        place = place or Place()
        bf16 = torch.bfloat16
        rows, vocab = student.shape
        call = KdCallC(rows=rows, vocab=vocab, ignore_index=settings.ignore_index, write_gradient=write_gradient)
        call.temperature, call.teacher_temperature = settings.temperature, settings.teacher_temperature
        call.ce_scale, call.kd_scale = settings.ce_scale, settings.kd_scale
        call.logit_scale, call.soft_cap = settings.logit_scale, settings.soft_cap or 0.0
        call.reverse = settings.direction == "reverse"
        address, placed = self.put(student, place.student_shift, place.gap, "student")
        call.student = LogitsC(address, vocab + place.gap, student.dtype == bf16)
        constant: list[tuple[str, Tensor, Tensor]] = []
        if labels is not None:
            call.labels = self.put(labels, name="labels")[0]
        if bias is not None:
            call.bias = self.put(bias.float(), name="bias")[0]
        if isinstance(targets, DenseTargets):
            address, teacher = self.put(targets.logits, place.teacher_shift, place.gap, "teacher")
            call.teacher = LogitsC(address, vocab + place.gap, targets.logits.dtype == bf16)
            constant.append(("teacher", teacher, teacher.clone()))
        elif isinstance(targets, TopKTargets):
            call.topk_ids, call.ids_are_64_bit = self.put(targets.ids)[0], targets.ids.dtype == torch.int64
            call.topk_logprobs, call.topk_tail = self.put(targets.logprobs)[0], self.put(targets.tail)[0]
            call.k = targets.ids.shape[1]
        call.ce_rows, ce = self._buffer(rows, torch.float32, name="ce")
        call.kd_rows, kd = self._buffer(rows, torch.float32, name="kd")
        space = self.library.lf_kd_workspace_bytes(ctypes.byref(call)) // 4
        call.workspace, workspace = self._buffer(space, torch.float32, name="workspace")
        workspace.fill_(torch.nan)
        between = placed.as_strided(
            (max(rows - 1, 0), place.gap), (vocab + place.gap, 1), placed.storage_offset() + vocab
        )
        error = ctypes.create_string_buffer(400)
        failed = self.library.lf_kd_rows(
            ctypes.byref(call), place.multiprocessors, place.cache_bytes, place.order, error, 400
        )
        found = ce.clone(), kd.clone(), placed.clone()
        untouched = bool(between.isnan().all()) and all(
            torch.equal(now.nan_to_num(7), before.nan_to_num(7)) for _, now, before in constant
        )
        self.finish(failed, error)
        if not untouched:
            raise EmulationError("wrote between the rows, or over the teacher")
        return found

    def decode(
        self,
        hidden: Tensor,
        weight: Tensor | Int8Weight,
        settings: DecodeSettings,
        seeds: Tensor | None = None,
        positions: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        place: Place | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(ids [N], logprobs [N])."""
        place = place or Place()
        matrix = weight.values if isinstance(weight, Int8Weight) else weight
        rows, width = hidden.shape
        call = DecodeCallC(rows=rows, width=width, vocab=settings.vocab, temperature=settings.temperature)
        padded = cuda_decode.padded(hidden)
        call.hidden, call.hidden_stride = self.put(padded, name="hidden")[0], padded.shape[1]
        call.weight = self.put(matrix, place.student_shift, place.gap, "weight")[0]
        call.weight_stride = width + place.gap
        call.weight_type = cuda_decode.WEIGHT_TYPES[matrix.dtype]
        if isinstance(weight, Int8Weight):
            call.scales = self.put(weight.scales, name="scales")[0]
        if bias is not None:
            call.bias = self.put(bias.float(), name="bias")[0]
        if not settings.greedy and seeds is not None and positions is not None:
            call.seeds, call.positions = self.put(seeds, name="seeds")[0], self.put(positions, name="positions")[0]
        call.logit_scale, call.soft_cap = settings.logit_scale, settings.soft_cap or 0.0
        call.top_k, call.top_p = cuda_decode.cut_of(settings)
        call.ids, ids = self._buffer(rows, torch.int64, name="ids")
        call.logprobs, logprobs = self._buffer(rows, torch.float32, name="logprobs")
        call.workspace, workspace = self._buffer(
            self.library.lf_decode_workspace_bytes(), torch.uint8, name="workspace"
        )
        workspace.fill_(0xA5)
        error = ctypes.create_string_buffer(400)
        failed = self.library.lf_decode(ctypes.byref(call), place.multiprocessors, place.order, error, 400)
        found = ids.clone(), logprobs.clone()
        self.finish(failed, error)
        return found


def build(folder: Path, sources: Path, name: str = "emulation") -> Emulation:
    """Compile the kernels under ``sources`` for the host."""
    library = folder / f"{name}.so"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-clobbered"]
    command += [f"-I{sources}", f"-I{HERE}", str(HERE / "emulate.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    return Emulation(library)


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The kernels as they are."""
    return build(tmp_path_factory.mktemp("emulation"), ROOT / "csrc" / "cuda")


@pytest.fixture(scope="session")
def places() -> type[Place]:
    """Where buffers may lie."""
    return Place


@pytest.fixture
def faulty_emulation(tmp_path: Path) -> Callable[[str, str, str], Emulation]:
    """Builds the kernels with one text in one file replaced by another."""

    def plant(file: str, text: str, instead: str) -> Emulation:
        sources = tmp_path / "csrc" / "cuda"
        shutil.copytree(ROOT / "csrc" / "cuda", sources)
        shutil.copy(ROOT / "csrc" / "gumbel.h", sources.parent)
        original = (sources / file).read_text()
        assert text in original, f"{file} no longer has {text!r}: plant the fault anew"
        (sources / file).write_text(original.replace(text, instead))
        return build(tmp_path, sources)

    return plant
