"""What is not accepted: each refusal names the value, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.evidence.digests import file_sha256
from latentforge.kernels import DenseTargets, KDCriterion, TopKTargets, kd_divergence, kd_loss, native
from latentforge.kernels.targets import topk_targets

N, V = 6, 40
GOOD: dict[str, Any] = {"temperature": 1.0, "ce_weight": 0.3, "kd_weight": 0.7, "denominator": 6.0}


def logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(0)).to(dtype)


LABELS = torch.arange(N)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("temperature", 0.0, "temperature = 0.0"),
        ("temperature", -2.0, "temperature = -2.0"),
        ("temperature", NAN, "temperature = nan"),
        ("temperature", INF, "temperature = inf"),
        ("teacher_temperature", 0.0, "teacher_temperature = 0.0"),
        ("ce_weight", -0.3, "ce_weight = -0.3"),
        ("kd_weight", -1.0, "kd_weight = -1.0"),
        ("kd_weight", NAN, "kd_weight = nan"),
        ("ce_weight", INF, "ce_weight = inf"),
        ("denominator", 0.0, "denominator = 0.0"),
        ("denominator", -5.0, "denominator = -5.0"),
        ("denominator", NAN, "denominator = nan"),
        ("direction", "backward", "'backward'"),
        ("backend", "fastest", "'fastest'"),
        ("backend", "cuda", "'cuda', and the tensors are on the CPU"),
        ("backend", "triton", "'triton', and the tensors are on the CPU"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(setting: str, value: Any, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        kd_loss(logits(), DenseTargets(logits()), LABELS, **(GOOD | {setting: value}))


@pytest.mark.parametrize("value", [0.0, -1.0, NAN])
def test_a_criterion_takes_no_bad_teacher_temperature_for_the_default(value: float) -> None:
    with pytest.raises(RefusedError, match=f"teacher_temperature = {value}"):
        KDCriterion(temperature=2.0, ce_weight=0.3, kd_weight=0.7, teacher_temperature=value)


def test_two_weights_of_zero_are_refused() -> None:
    with pytest.raises(RefusedError, match="nothing is left"):
        kd_loss(logits(), DenseTargets(logits()), LABELS, **(GOOD | {"ce_weight": 0.0, "kd_weight": 0.0}))


def test_a_kd_weight_without_targets_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"kd_weight = 0\.7"):
        kd_loss(logits(), None, LABELS, **GOOD)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("label", [V, -1, 10**12, -(10**12)])
def test_a_label_outside_the_vocabulary_is_named_and_nothing_is_written(backend: str, label: int) -> None:
    labels = LABELS.clone()
    labels[4] = label
    student = logits().requires_grad_() * 1
    kept = student.detach().clone()
    with pytest.raises(RefusedError, match=f"label {label} at row 4"):
        kd_loss(student, DenseTargets(logits()), labels, backend=backend, **GOOD)
    assert torch.equal(student.detach(), kept)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("value", "said"), [(V, f"id {V} at row 2"), (-2, "id -2 at row 2"), (None, "twice at row 2")])
def test_an_id_out_of_range_or_given_twice_is_named(backend: str, value: int | None, said: str) -> None:
    targets = topk_targets(logits(), 4, 1.0)
    targets.ids[2, 1] = targets.ids[2, 3] if value is None else value
    student = logits().requires_grad_() * 1
    kept = student.detach().clone()
    with pytest.raises(RefusedError, match=said):
        kd_loss(student, targets, LABELS, backend=backend, **GOOD)
    with pytest.raises(RefusedError, match=said):
        kd_divergence(student, targets, 1.0, backend=backend)
    assert torch.equal(student.detach(), kept)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_tail_where_nothing_is_outside_is_refused(backend: str) -> None:
    targets = topk_targets(logits(), V, 1.0)
    targets.tail[3] = -4.0
    with pytest.raises(RefusedError, match="tail -4 at row 3"):
        kd_loss(logits(), targets, LABELS, backend=backend, **GOOD)


def test_shapes_and_types_that_do_not_match_are_named() -> None:
    topk = topk_targets(logits(), 4, 1.0)
    wider = TopKTargets(torch.zeros(N, V + 1, dtype=torch.int64), torch.zeros(N, V + 1), torch.zeros(N))
    for student, targets, labels, said in (
        (logits()[0], DenseTargets(logits()), LABELS, r"\(40,\)"),
        (logits(), DenseTargets(logits()[:, :-1]), LABELS, r"teacher logits have shape \(6, 39\)"),
        (logits(), DenseTargets(logits()[:-1]), LABELS, r"teacher logits have shape \(5, 40\)"),
        (logits(), DenseTargets(logits()), LABELS[:-1], r"labels have shape \(5,\)"),
        (logits(), DenseTargets(logits()), LABELS.int(), "labels are torch.int32"),
        (logits(torch.float16), DenseTargets(logits()), LABELS, "student logits are torch.float16"),
        (logits(), DenseTargets(logits(torch.float16)), LABELS, "teacher logits are torch.float16"),
        (logits(), wider, LABELS, "k = 41"),
        (logits(), TopKTargets(topk.ids[:, :0], topk.logprobs[:, :0], topk.tail), LABELS, "k = 0"),
        (logits(), TopKTargets(topk.ids, topk.logprobs[:, :3], topk.tail), LABELS, r"logprobs have shape \(6, 3\)"),
        (logits(), TopKTargets(topk.ids, topk.logprobs, topk.tail[:-1]), LABELS, r"tail have shape \(5,\)"),
        (logits(), TopKTargets(topk.ids, topk.logprobs.double(), topk.tail), LABELS, "logprobs are torch.float64"),
        (logits(), TopKTargets(topk.ids.float(), topk.logprobs, topk.tail), LABELS, "ids are torch.float32"),
        (logits(), logits(), LABELS, "targets are Tensor"),
    ):
        with pytest.raises(RefusedError, match=said):
            kd_loss(student, targets, labels, **GOOD)  # type: ignore[arg-type]


def test_tensors_on_another_device_are_told_what_to_do() -> None:
    student = torch.empty(N, V, device="meta")
    with pytest.raises(RefusedError, match="meta") as refusal:
        kd_loss(student, DenseTargets(student), LABELS.to("meta"), **GOOD)
    assert "reference" in str(refusal.value.next)
    with pytest.raises(RefusedError, match="teacher logits are on meta"):
        kd_loss(logits(), DenseTargets(student), LABELS, **GOOD)


def test_the_cpu_backend_refuses_fp64() -> None:
    with pytest.raises(RefusedError, match="fp64"):
        kd_loss(logits(torch.float64), DenseTargets(logits()), LABELS, backend="cpu", **GOOD)


def test_an_extension_built_from_other_sources_is_refused() -> None:
    built = native.native().source_digest()
    native.require_fresh(built, built)
    native.require_fresh(built, None)
    with pytest.raises(LatentForgeError, match="stale") as refusal:
        native.require_fresh(built, "0" * 64)
    assert refusal.value.next == "make setup"


def test_a_run_names_the_library_file_that_it_loaded_by_its_content() -> None:
    library = native.native().__file__
    assert library is not None
    assert native.extension_identity()["sha256"] == file_sha256(Path(library))


def test_a_changed_source_file_changes_the_digest(tmp_path: Any) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "CMakeLists.txt").write_text("one")
    assert native.source_digest(tmp_path) is None
    (tmp_path / "csrc" / "module.cpp").write_text("two")
    before = native.source_digest(tmp_path)
    (tmp_path / "csrc" / "module.cpp").write_text("three")
    assert before is not None
    assert native.source_digest(tmp_path) != before
    (tmp_path / "csrc" / "module.cpp").write_text("two")
    (tmp_path / "csrc" / "notes.swp").write_text("an editor's leavings do not count")
    assert native.source_digest(tmp_path) == before


def test_a_missing_extension_is_an_error_with_a_remedy_and_not_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "latentforge._native", None)
    native.native.cache_clear()
    try:
        with pytest.raises(LatentForgeError, match="not built") as refusal:
            kd_loss(logits(), DenseTargets(logits()), LABELS, **GOOD)
        assert "make setup" in str(refusal.value.next)
        kd_loss(logits(), DenseTargets(logits()), LABELS, backend="reference", **GOOD)
    finally:
        native.native.cache_clear()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_teacher_that_is_the_student_is_refused_and_left_as_it_is(backend: str) -> None:
    logits = torch.randn(3, 8, requires_grad=True) * 1.0
    teacher = logits.detach()
    before = teacher.clone()
    with pytest.raises(RefusedError, match=r"teacher's logits of shape \(3, 8\) share the storage"):
        kd_loss(
            logits,
            DenseTargets(teacher),
            torch.zeros(3, dtype=torch.int64),
            temperature=2.0,
            ce_weight=0.3,
            kd_weight=0.7,
            denominator=3.0,
            backend=backend,
        )
    assert torch.equal(teacher, before)


@pytest.mark.parametrize("wanted", [True, False])
def test_an_fp64_bias_is_not_rounded_unasked(wanted: bool) -> None:
    logits = torch.randn(3, 8, requires_grad=wanted) * 1.0
    with pytest.raises(RefusedError, match="fp64 tensors, and the backend is 'cpu'"):
        kd_loss(
            logits,
            DenseTargets(torch.randn(3, 8)),
            torch.zeros(3, dtype=torch.int64),
            temperature=2.0,
            ce_weight=0.3,
            kd_weight=0.7,
            denominator=3.0,
            bias=torch.zeros(8, dtype=torch.float64),
            backend="cpu",
        )


def test_labels_are_not_left_out() -> None:
    missing: Any = None
    with pytest.raises(RefusedError, match="labels are None"):
        kd_loss(
            torch.randn(3, 8),
            DenseTargets(torch.randn(3, 8)),
            missing,
            temperature=2.0,
            ce_weight=0.3,
            kd_weight=0.7,
            denominator=3.0,
        )


def test_the_gradient_of_a_bias_is_summed_without_a_copy_of_the_logits() -> None:
    """Of bf16 gradients torch's own sum makes an fp32 copy: twice what the caller passed."""
    from torch.profiler import ProfilerActivity, profile

    rows, vocab = 512, 4096
    logits = torch.randn(rows, vocab).bfloat16().requires_grad_()
    bias = torch.randn(vocab).bfloat16().requires_grad_()
    teacher, labels = torch.randn(rows, vocab).bfloat16(), torch.randint(0, vocab, (rows,))
    given = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5, "denominator": float(rows)}
    loss = kd_loss(logits * 1, DenseTargets(teacher), labels, bias=bias, **given).loss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss.backward()
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert largest <= rows * vocab * 2  # the gradient that `logits * 1` hands on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as planted:
        teacher.sum(0, dtype=torch.float32)
    assert max(event.cpu_memory_usage for event in planted.events()) >= rows * vocab * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": None}, "temperature = None"),
        ({"temperature": "2"}, "temperature = '2'"),
        ({"ignore_index": 2.5}, "ignore_index = 2.5"),
        ({"direction": "jsd", "beta": None}, "beta = None"),
        ({"targets": DenseTargets(None)}, "teacher logits = None"),  # type: ignore[arg-type]
        ({"targets": TopKTargets(torch.zeros(2, 1).long(), torch.zeros(2, 1), None)}, "tail = None"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_number_or_no_tensor_is_named(change: dict[str, object], words: str) -> None:
    given: dict[str, object] = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5, "denominator": 2.0}
    given |= {"targets": DenseTargets(torch.randn(2, 5)), "labels": torch.tensor([1, 2]), **change}
    with pytest.raises(RefusedError, match=words):
        kd_loss(torch.randn(2, 5), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (6, 1.0), (2, 0.0)])
def test_no_topk_is_made_of_nothing(k: int, temperature: float) -> None:
    from latentforge.kernels.targets import topk_targets

    with pytest.raises(RefusedError, match=r"k = |temperature = "):
        topk_targets(torch.randn(2, 5), k, temperature)
