"""How a teacher in this process computes: by what is asked, or by what was measured to run on the GPU.

A quantised teacher once spent a night on the CPU beside an idle GPU, chosen by its name. Here each path that could be
taken is loaded and timed on a first batch, the GPU's own utilisation says whether it ran there, and the decision is a
function of these figures alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.memory import HostMemory, KnownModel, margin
from latentforge.memory.plan import gib
from latentforge.teachers.folder import ModelFolder, check_model_folder
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.loading import Dtype, stored_dtype
from latentforge.teachers.utilisation import IDLE_PERCENT, gpu_utilisation, sampled

Asked = Literal["auto", "fp32", "bf16", "quantized"]
Precision = Literal["fp32", "bf16", "quantized"]

_FULLNESS: tuple[Precision, ...] = ("fp32", "bf16", "quantized")
_SAME_SPEED = 0.95
"""Paths within 5 % of the fastest are as fast: the fuller precision of them is taken."""
_PROBE_ROWS, _PROBE_LENGTH = 4, 128
_PROBE_SECONDS = 1.5


@dataclass(frozen=True)
class Trial:
    """What one path came to on a first batch.

    ``tokens_per_second`` None: not measured; ``utilisation`` in percent of the GPU, None: unknown, which is not idle;
    ``refused``: why it cannot be taken at all.
    """

    precision: Precision
    tokens_per_second: float | None = None
    utilisation: float | None = None
    refused: str | None = None

    @property
    def idle(self) -> bool:
        """Whether it is known to leave the GPU idle."""
        return self.utilisation is not None and self.utilisation < IDLE_PERCENT

    def told(self) -> str:
        """The figures for a reader."""
        if self.refused is not None:
            return f"{self.precision} cannot be taken ({self.refused})"
        if self.tokens_per_second is None:
            return f"{self.precision} was not measured"
        use = "utilisation unknown" if self.utilisation is None else f"GPU {self.utilisation:.0f} % busy"
        return f"{self.precision} {self.tokens_per_second:.0f} tokens/s, {use}"


@dataclass(frozen=True)
class PrecisionChoice:
    """The path that is taken, why, and what each path came to. ``idle``: even the best leaves the GPU idle."""

    asked: Asked
    precision: Precision
    device: str
    reason: str
    trials: tuple[Trial, ...] = ()
    idle: bool = False

    def as_json(self) -> dict[str, Any]:
        """The fields of the event."""
        return asdict(self)


def paths_of(asked: Asked, *, gpu: bool, quantization: str | None, stored: str | None = None) -> tuple[Precision, ...]:
    """The paths to try, in the order of trust; RefusedError where what is asked cannot be meant for this folder.

    Without a GPU, ``auto`` is what computes right everywhere: fp32 of plain numbers, the folder's own of quantised.
    ``stored`` is the folder's dtype: what is kept in bf16 is not also tried in fp32, which is twice as large and no
    more exact than the weights are.
    """
    if asked == "quantized" and quantization is None:
        raise RefusedError(
            "teacher.precision = 'quantized', and the teacher's folder is not quantised",
            next="set teacher.precision = 'auto', or name a quantised folder",
        )
    if asked != "auto":
        return (asked,)
    if quantization is not None:
        return ("quantized", "bf16") if gpu else ("quantized",)
    if not gpu:
        return ("fp32",)
    return ("bf16",) if stored == "BF16" else ("bf16", "fp32")


def choose_precision(asked: Asked, trials: Iterable[Trial], *, gpu: bool) -> PrecisionChoice:
    """The decision, from the trials alone (their order does not matter).

    What is asked is taken, or refused with its reason. Else: of the paths that can be taken, those that are known to
    leave the GPU idle go last, whatever their speed; of the rest the fastest, and the fullest of those as fast.
    """
    trials = tuple(sorted(trials, key=lambda trial: _FULLNESS.index(trial.precision)))
    device = "cuda" if gpu else "cpu"
    able = [trial for trial in trials if trial.refused is None]
    if not able:
        raise RefusedError(
            "the teacher cannot be computed here: " + "; ".join(trial.told() for trial in trials),
            next="serve it with vLLM (teacher.backend = 'vllm-local'), or name another folder",
        )
    if asked != "auto":
        found = able[0]
        reason = "asked for" if found.tokens_per_second is None else f"asked for: {found.told()}"
        return PrecisionChoice(asked, found.precision, device, reason, trials)
    if not gpu:
        found = able[0]
        kept = "what the folder holds" if found.precision == "quantized" else "exact, and bf16 is no faster on a CPU"
        return PrecisionChoice(asked, found.precision, device, f"no GPU: {found.precision}, {kept}", trials)
    awake = [trial for trial in able if not trial.idle]
    fit = awake or able
    fastest = max(trial.tokens_per_second or 0.0 for trial in fit)
    found = next(trial for trial in fit if (trial.tokens_per_second or 0.0) >= _SAME_SPEED * fastest)
    others = "; ".join(trial.told() for trial in trials if trial is not found)
    reason = found.told() + (f" (others: {others})" if others else ", the only path")
    if not awake:
        reason = f"every path leaves the GPU idle: {reason}"
    return PrecisionChoice(asked, found.precision, device, reason, trials, idle=not awake)


def open_hf(path: Path, asked: Asked, device: str) -> HFTeacher:
    """Open a folder at the precision that is asked for; ``auto`` on a GPU loads and times each path first.

    The teacher's ``choice`` says what was taken and why.
    """
    folder = check_model_folder(Path(path))
    gpu = torch.device(device).type == "cuda"
    paths = paths_of(asked, gpu=gpu, quantization=folder.quantization, stored=stored_dtype(folder))
    if not gpu:
        choice = choose_precision(asked, [Trial(one) for one in paths], gpu=False)
        return _open(folder, choice.precision, device, choice)
    trials = try_paths(paths, lambda one: _admitted(folder, one, device), measure)
    choice = choose_precision(asked, trials, gpu=True)
    return _open(folder, choice.precision, device, choice)


def try_paths(
    paths: Sequence[Precision],
    opened: Callable[[Precision], HFTeacher],
    measured: Callable[[HFTeacher], tuple[float, float | None]],
) -> list[Trial]:
    """One trial a path: opened, timed, let go before the next is loaded. What cannot be opened or run is refused."""
    trials = []
    for one in paths:
        try:
            teacher = opened(one)
            try:
                speed, utilisation = measured(teacher)
                trials.append(Trial(one, speed, utilisation))
            finally:
                teacher.close()
                del teacher
        except (LatentForgeError, RuntimeError, ImportError, NotImplementedError) as error:
            trials.append(Trial(one, refused=(str(error).strip().splitlines() or [type(error).__name__])[0]))
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return trials


def measure(teacher: HFTeacher, *, seconds: float = _PROBE_SECONDS) -> tuple[float, float | None]:
    """Tokens a second of a first batch, after one to get warm, and the GPU's utilisation meanwhile (None: unknown)."""
    device = teacher.model.device
    astray = sum(1 for tensor in teacher.model.parameters() if tensor.device.type != device.type)
    if astray:
        raise RefusedError(f"{astray} of its tensors are not on {device.type}")
    limit = teacher.folder.max_positions or _PROBE_LENGTH
    shape = (_PROBE_ROWS, min(_PROBE_LENGTH, limit) + 1)
    tokens = torch.randint(0, teacher.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    teacher.logits(tokens)
    _wait(device)
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    batches = 0
    with sampled(lambda: gpu_utilisation(uuid)) as readings:
        began = time.perf_counter()
        while batches < 2 or time.perf_counter() - began < seconds:
            teacher.logits(tokens)
            _wait(device)
            batches += 1
        spent = time.perf_counter() - began
    # The first reading looks back on the time before the batches.
    known = readings[1:]
    return batches * tokens.numel() / spent, statistics.median(known) if known else None


def _admitted(folder: ModelFolder, precision: Precision, device: str) -> HFTeacher:
    """Load one path for its trial, unless the host has no room for it: on a GB10 that would end the host."""
    known = KnownModel.of_folder(folder.path)
    weights, host = known.weights(precision, "cuda"), HostMemory.read()
    if weights is not None and host.total is not None and host.available is not None:
        need = weights + margin(host.total)
        if need > host.available:
            raise RefusedError(f"{gib(need)} GiB with the margin, {gib(host.available)} are free")
    return _open(folder, precision, device, None)


def _open(folder: ModelFolder, precision: Precision, device: str, choice: PrecisionChoice | None) -> HFTeacher:
    dtype: Dtype = "float32" if precision == "fp32" else "bfloat16"
    expand = precision != "quantized" and folder.quantization is not None
    return HFTeacher.open(folder.path, device=device, dtype=dtype, expand=expand, folder=folder, choice=choice)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
