"""How far a backend's ``kd_loss`` is from fp64, beside how far torch is at the same precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.kernels.parity import where
from latentforge.kernels.parity.finding import Parity, disagreements, distance
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets, cut_rows, topk_targets

# What the gradient error may be, as a multiple of torch's own at the same precision. For bf16 both are the rounding of
# the result; for fp32 both are a few units in the last place of different sums, hence the width and the floor.
ALLOWED = {torch.bfloat16: 1.01, torch.float32: 1.5}
GRADIENT_FLOOR = 5e-7
LOSS_FLOOR = 1e-5
EDGES = ("rows", "all masked", "k over support", "excluded by the teacher", "mixed k")
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "int8"}


@dataclass(frozen=True)
class Case:
    """One comparison: shape, precision, temperatures, width of the logits, kind of targets, direction, and oddities.

    ``noise`` is how far the student is from the teacher, ``padding`` the columns that are minus infinity on both sides,
    ``padded_side`` may restrict them to ``student`` or ``teacher``; ``misaligned`` puts the logits at an odd address
    with rows further apart than V; ``edge`` is one of EDGES.
    """

    vocab: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    temperature: float
    k: int | None = None
    noise: float = 0.7
    width: float = 1.0
    padding: int = 0
    rows: int = 12
    direction: str = "forward"
    beta: float = 0.5
    teacher_temperature: float | None = None
    ce: float = 0.3
    bias: bool = False
    logit_scale: float = 1.0
    soft_cap: float | None = None
    padded_side: str = "both"
    misaligned: bool = False
    edge: str | None = None

    def __str__(self) -> str:
        kind = "dense" if self.k is None else f"k={self.k}"
        said = [
            f"V={self.vocab} {NAMES[self.student_dtype]}/{NAMES[self.teacher_dtype]} T={self.temperature:g} {kind}",
            f"{self.direction}" + (f" beta {self.beta:g}" if self.direction == "jsd" else ""),
            f"noise {self.noise:g} width {self.width:g}",
        ]
        said += [f"padding {self.padding} ({self.padded_side})"] if self.padding else []
        said += [f"teacher T={self.teacher_temperature:g}"] if self.teacher_temperature is not None else []
        said += ["bias"] if self.bias else []
        said += [f"scale {self.logit_scale:g}"] if self.logit_scale != 1.0 else []
        said += [f"cap {self.soft_cap:g}"] if self.soft_cap is not None else []
        said += ["misaligned"] if self.misaligned else []
        said += ["KL alone"] if self.ce == 0.0 else []
        said += [self.edge] if self.edge else []
        return ", ".join(said)

    @property
    def settings(self) -> KDSettings:
        """What a backend is asked to compute; the gradient's factors are those of a mean over the rows."""
        rows = max(self.rows, 1)
        return KDSettings(
            self.temperature,
            self.teacher_temperature or self.temperature,
            ce_scale=self.ce / rows,
            kd_scale=0.7 * self.temperature**2 / rows,
            direction=self.direction,
            beta=self.beta,
            logit_scale=self.logit_scale,
            soft_cap=self.soft_cap,
        )

    def tensors(self, seed: int = 0) -> tuple[Tensor, Targets, Tensor]:
        """Student logits, targets and labels: peaked rows, a student near its teacher, padding, two ignored rows."""
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(self.rows, self.vocab, generator=generator) * 2.2 * self.width
        peaks = torch.rand(self.rows, min(64, self.vocab), generator=generator) * 16.0 * self.width
        for row in range(self.rows):
            teacher[row, torch.randperm(self.vocab, generator=generator)[: peaks.shape[1]]] += peaks[row]
        student = teacher + self.noise * torch.randn(self.rows, self.vocab, generator=generator)
        if self.padding:
            if self.padded_side in ("both", "student"):
                student[:, -self.padding :] = -torch.inf
            if self.padded_side in ("both", "teacher"):
                teacher[:, -self.padding :] = -torch.inf
        labels = torch.randint(0, self.vocab - self.padding, (self.rows,), generator=generator)
        labels[:2] = -100
        student, teacher, labels = self._with_edge(student, teacher, labels)
        student, teacher = student.to(self.student_dtype), teacher.to(self.teacher_dtype)
        if self.k is None:
            return _placed(student, self.misaligned), DenseTargets(_placed(teacher, self.misaligned)), labels
        targets = topk_targets(teacher, self.k, self.teacher_temperature or self.temperature)
        if self.edge == "mixed k":
            targets = cut_rows(targets, mixed_counts(self.rows, self.k), self.teacher_temperature or self.temperature)
        return _placed(student, self.misaligned), targets, labels

    def bias_tensor(self) -> Tensor | None:
        """The bias [V] in the student's dtype, or None."""
        if not self.bias:
            return None
        return torch.randn(self.vocab, generator=torch.Generator().manual_seed(99)).to(self.student_dtype)

    def _with_edge(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.edge == "rows":
            inf, nan = torch.inf, torch.nan
            student[0] = nan  # ignored: zeros whatever is in it
            student[2, self.vocab // 2] = nan
            student[3, 1] = inf
            student[4] = -inf
            student[5] *= 900.0  # wide
            student[6, : self.vocab // 3] = -inf  # the first block says nothing of the row
            teacher[6, : self.vocab // 3] = -inf
            labels[6] = self.vocab - 1
            student[7, self.vocab // 2 :] += 600.0  # the first block is far below the row's largest
            teacher[7, self.vocab // 2 :] += 600.0
            if self.k is None:
                teacher[8, 3] = nan
                teacher[9] = -inf
        elif self.edge == "all masked":
            labels[:] = -100
        elif self.edge == "k over support":
            assert self.k is not None
            teacher[:, self.k // 2 :] = -torch.inf
        elif self.edge == "excluded by the teacher":
            teacher[3, 0] = -torch.inf  # forward: costs nothing; reverse: loss +inf, gradient NaN
        elif self.edge is not None and self.edge != "mixed k":
            raise ValueError(f"edge {self.edge!r} is not one of {EDGES}")
        return student, teacher, labels


def mixed_counts(rows: int, k: int) -> Tensor:
    """How many entries each row keeps where they differ, [rows]: from none at all to k, side by side."""
    return torch.tensor([0, k, k // 2, 0, 1, k, k - 1])[torch.arange(rows) % 7]


def _placed(logits: Tensor, misaligned: bool) -> Tensor:
    """The same numbers one element after an aligned address, in rows that are 3 elements further apart."""
    if not misaligned:
        return logits
    rows, vocab = logits.shape
    storage = torch.full((1 + rows * (vocab + 3),), 7.5, dtype=logits.dtype)
    view = storage.as_strided((rows, vocab), (vocab + 3, 1), 1)
    view.copy_(logits)
    return view


def compare(
    case: Case,
    backend: str = "cpu",
    *,
    isa: str | None = None,
    disturb: Callable[[Tensor], Tensor] | None = None,
) -> Parity:
    """Errors of a backend and of torch at the case's precision, both against fp64 on the same logits.

    ``isa`` is an instruction set of the cpu backend; ``disturb`` changes the backend's gradient before it is judged (a
    planted fault). A loss or gradient that is NaN or infinite must be so in the same places.
    """
    student, targets, labels = case.tensors()
    bias, settings = case.bias_tensor(), case.settings
    exact_targets = DenseTargets(targets.logits.double()) if isinstance(targets, DenseTargets) else targets
    exact = reference.row_losses(student.double(), exact_targets, labels, settings, bias=bias, gradient=True)
    torch_rows = reference.row_losses(student, targets, labels, settings, bias=bias, gradient=True)
    assert exact.gradient is not None
    assert torch_rows.gradient is not None

    device = where.device_of(backend)
    # A clone would lose the address and the row stride that the case is about.
    given = _placed(student.clone(), case.misaligned) if device.type == "cpu" else student.to(device)
    around = given.untyped_storage().nbytes() // given.element_size() - given.numel()
    if backend == "reference":
        found = reference.row_losses(given, targets, labels, settings, bias=bias, gradient=True)
        assert found.gradient is not None
        ce, kd, gradient = found.ce, found.kd, found.gradient.to(student.dtype)
    else:
        own = {"isa": isa} if isa is not None else {}
        ce, kd = where.room("kd_loss", backend).row_losses(
            given,
            _moved(targets, device),
            labels.to(device),
            settings,
            bias=None if bias is None else bias.to(device),
            write_gradient=True,
            **own,
        )
        gradient = given.cpu()
    ce, kd = ce.double().cpu(), kd.double().cpu()
    if disturb is not None:
        gradient = disturb(gradient)
    error = distance(gradient, exact.gradient)
    torch_error = distance(torch_rows.gradient.to(student.dtype), exact.gradient)
    allowed = max(ALLOWED[case.student_dtype] * torch_error, GRADIENT_FLOOR)
    losses, torch_losses = torch.stack([ce, kd]), torch.stack([torch_rows.ce, torch_rows.kd])
    exact_losses = torch.stack([exact.ce, exact.kd])
    written_outside = 0
    if case.misaligned and device.type == "cpu":
        storage = torch.as_strided(given, (given.numel() + around,), (1,), 0)
        written_outside = around - int((storage == 7.5).sum())
        # A gradient of exactly 7.5 does not occur: they are probabilities over the number of rows.
    return Parity(
        str(case),
        error,
        torch_error,
        error / allowed,
        loss_distance(losses, exact_losses),
        loss_distance(torch_losses, exact_losses),
        loss_floor=LOSS_FLOOR,
        disagreements=disagreements(gradient, exact.gradient) + disagreements(losses, exact_losses) + written_outside,
    )


def _moved(targets: Targets, device: torch.device) -> Targets:
    if isinstance(targets, TopKTargets):
        return TopKTargets(targets.ids.to(device), targets.logprobs.to(device), targets.tail.to(device))
    # On the CPU the teacher stays where the case put it: its address and stride are part of the case.
    return targets if device.type == "cpu" else DenseTargets(targets.logits.to(device))


def loss_distance(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative where the exact loss is above 1, over what is finite in both."""
    both = found.isfinite() & exact.isfinite()
    if not bool(both.any()):
        return 0.0
    gap = (found.double() - exact.double())[both].abs()
    return float((gap / exact[both].abs().clamp_min(1.0)).max())
