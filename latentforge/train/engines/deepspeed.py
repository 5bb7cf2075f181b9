"""DeepSpeed's ZeRO: optimiser and gradients sharded (stage 2), or the weights too (stage 3)."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from latentforge.errors import FailedError, RefusedError
from latentforge.spec.spread import Stage, settings_of
from latentforge.train.engines.protocol import Wrapped
from latentforge.train.engines.world import World
from latentforge.train.optimiser import Updates, grouped


def library() -> Any:
    """DeepSpeed, quiet and without what it would compile; RefusedError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise RefusedError(
            f"distributed = 'deepspeed-…' needs DeepSpeed, which cannot be imported: {error}",
            next="pip install 'latentforge[deepspeed]', or set distributed = 'fsdp2'",
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls torch's collectives by names that torch is about to rename, and torch says so at each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # An all-reduce in shared memory, for inference: nothing here calls it, and it would be compiled at start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Asked whether it can shard AdamW it imports Muon, which torch.compile takes and with it the whole of Inductor:
    # seconds of each process's start, for an optimiser that is not in use.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    return deepspeed


class ZeroOptimiser:
    """DeepSpeed's optimiser as recipes see it: torch's AdamW over the own part of fp32 masters."""

    def __init__(self, engine: Any, trained: nn.Module, updates: Updates) -> None:
        self._engine = engine
        self._trained = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        self.clip_norm = updates.clip_norm
        self.schedule = updates.schedule
        for group in self.groups:
            group["initial_lr"] = group["lr"]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's own groups."""
        found: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return found

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that the schedule scales, read from the optimiser."""
        return float(self.groups[0]["initial_lr"])

    @property
    def weight_decay(self) -> float:
        """The weight decay of matrices, read from the optimiser."""
        return float(self.groups[0]["weight_decay"])

    def set_learning_rate(self, step: int) -> float:
        """Set every group to the schedule's value of ``step`` (from 0) and return what the optimiser now holds."""
        for group in self.groups:
            group["lr"] = group["initial_lr"] * self.schedule(step)
        return float(self.groups[0]["lr"])

    def each_weight(self) -> Iterator[tuple[str, Tensor]]:
        """All trained parameters by name, whole, as fp32 masters."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, p in self._trained.items():
            yield name, _as_fp32(safe_get_full_fp32_param(p))

    def each_moment(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's state, whole; nothing before the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        made = self._steps()
        if made is None:
            return
        self._link()
        for name, p in self._trained.items():
            yield f"{name}/step", made.clone()
            for key in ("exp_avg", "exp_avg_sq"):
                yield f"{name}/{key}", _as_fp32(safe_get_full_optimizer_state(p, key))

    def weights(self) -> dict[str, Tensor]:
        """Those of :meth:`each_weight`, all at once."""
        return dict(self.each_weight())

    def moments(self) -> dict[str, Tensor]:
        """Those of :meth:`each_moment`, all at once."""
        return dict(self.each_moment())

    def forget_gradients(self) -> None:
        """Refused: what DeepSpeed has averaged of a step lies in buffers of its own, which nothing else clears."""
        raise RefusedError(
            "endurance.on_bad_step = 'skip': DeepSpeed keeps what it added up of a step that is not made",
            next="set endurance.on_bad_step = 'stop', or distributed = 'ddp' or 'fsdp2'",
        )

    @torch.no_grad()
    def load(self, masters: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Put back what :meth:`weights` and :meth:`moments` of any engine gave."""
        steps = {name: int(value) for name, value in moments.items() if name.endswith("/step")}
        if steps and (len(set(steps.values())) > 1 or len(steps) < len(self._trained)):
            raise RefusedError(
                f"{len(steps)} of {len(self._trained)} tensors have moments, of {sorted(set(steps.values()))} steps: "
                "DeepSpeed counts one for all of them",
                next="resume with distributed = 'none', 'ddp' or 'fsdp2'",
            )
        if steps:
            self._make_moments(next(iter(steps.values())))
        for name, p in self._trained.items():
            self._set_whole(p, masters[name])
            for key in ("exp_avg", "exp_avg_sq") if steps else ():
                self._set_master(p, moments[f"{name}/{key}"], key)

    def flats(self) -> list[Tensor]:
        """The own part of the masters, a flat tensor a group, by which torch's AdamW knows its state."""
        zero = self._engine.optimizer
        stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
        found: list[Tensor] = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
        return found

    def _steps(self) -> Tensor | None:
        state = self._engine.optimizer.optimizer.state
        return next((found["step"] for found in state.values() if "step" in found), None)

    def _make_moments(self, steps: int) -> None:
        """The moments as they are after a first step, for values to be put into."""
        zero = self._engine.optimizer
        for flat in self.flats():
            made = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
            zero.optimizer.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **made}
        self._link()

    def _link(self) -> None:
        """Stage 2 links each parameter to its moments, once: after the first group's step, when the second has none."""
        zero = self._engine.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _set_whole(self, p: nn.Parameter, value: Tensor) -> None:
        """Both the weight that passes use and its master."""
        import deepspeed

        if hasattr(p, "ds_id"):
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(value.to(p.device))
        else:
            p.copy_(value.to(p.device))
        self._set_master(p, value, None)

    def _set_master(self, p: nn.Parameter, value: Tensor, key: str | None) -> None:
        """The own part of a whole master, or of its moment ``key``."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if hasattr(p, "ds_id"):
            # DeepSpeed's own setter of a whole value reads past the end of one that is not divisible.
            size, world = int(p.ds_tensor.numel()), World.here()  # type: ignore[attr-defined]
            flat = value.flatten().to(p.device, torch.float32)
            padded = torch.nn.functional.pad(flat, (0, size * world.size - flat.numel()))
            part = padded.narrow(0, size * world.rank, size)
            safe_set_local_fp32_param(p, part) if key is None else safe_set_local_optimizer_state(p, part, key)
        else:
            safe_set_full_fp32_param(p, value) if key is None else safe_set_full_optimizer_state(p, value, key)


class DeepSpeed:
    """The engines ``deepspeed-zero2`` and ``deepspeed-zero3`` over ``student``, of which ``trained`` names tensors."""

    def __init__(
        self,
        student: nn.Module,
        trained: nn.Module,
        updates: Updates,
        *,
        stage: Stage,
    ) -> None:
        deepspeed = library()
        self.world = World.here()
        self.stage = stage
        self.name = f"deepspeed-zero{stage}"
        settings = settings_of(stage)
        settings["optimizer"]["params"] |= {"lr": updates.learning_rate, "weight_decay": updates.weight_decay}
        settings["gradient_clipping"] = updates.clip_norm or 0.0
        bf16 = next(student.parameters()).dtype == torch.bfloat16
        settings["bf16"] = {"enabled": bf16}
        engine, *_ = deepspeed.initialize(
            model=student,
            model_parameters=grouped([p for p in student.parameters() if p.requires_grad], updates.weight_decay),
            config=settings,
            dist_init_required=False,
        )
        self.module = engine
        self.optimiser = ZeroOptimiser(engine, trained, updates)

    @property
    def precision(self) -> torch.dtype:
        """That of the weights themselves, as DeepSpeed holds it."""
        return torch.bfloat16 if self.module.bfloat16_enabled() else torch.float32

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing is held back for the last pass: its settings leave the accumulation to us."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one pass."""
        # DeepSpeed averages over the processes, and would divide by its count of passes.
        self.module.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self) -> float:
        """Update the own part; the norm of the whole gradient before clipping."""
        self.module.step()
        return float(self.module.get_global_grad_norm())

    def rehearsed(self) -> None:
        """Gradients of zero stay where DeepSpeed adds them up: what comes to them stays as it is, bit for bit."""

    def wrapped(self) -> Wrapped:
        """The sizes of what DeepSpeed keeps here, read from its objects."""
        whole = [p for p in self.module.module.parameters() if p.requires_grad]
        numels = [int(getattr(p, "ds_numel", p.numel())) for p in whole]
        held = sum(int(p.ds_tensor.numel()) if hasattr(p, "ds_tensor") else p.numel() for p in whole)
        open_ = [p for p in whole if hasattr(p, "ds_id") and p.numel()]
        if self.stage == 3 and (open_ or not all(hasattr(p, "ds_id") for p in whole)):
            raise FailedError(f"distributed = {self.name!r}: {len(open_)} tensor(s) are whole between two steps")
        states = sum(flat.numel() for flat in self.optimiser.flats())
        wrapper = f"{type(self.module).__name__}/{type(self.module.optimizer).__name__}"
        found = Wrapped(self.name, wrapper, self.world.size, sum(numels), held, states)
        inner = "DeepSpeedZeroOptimizer" if self.stage == 2 else "DeepSpeedZeroOptimizer_Stage3"
        return found.require(
            self.name,
            wrapper=f"DeepSpeedEngine/{inner}",
            sharded=self.stage == 3,
            states_sharded=True,
            largest=4 * self.world.size + len(whole),  # it pads groups, and in stage 3 each tensor
        )


def _as_fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().float()
