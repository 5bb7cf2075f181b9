"""The token-level student: its logits, its start, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentforge.errors import RefusedError
from latentforge.kernels.targets import DenseTargets
from latentforge.students.causal import ModelShape, Student, cast_weights, model_from_folder, new_model

SHAPE = ModelShape(layers=1, hidden=32, heads=2, kv_heads=1, intermediate=48)


def model(vocab_size: int = 40, seed: int = 1) -> Any:
    return new_model(SHAPE, vocab_size=vocab_size, positions=16, eos_id=0, seed=seed)


def tokens(below: int = 40) -> torch.Tensor:
    return torch.randint(0, below, (3, 9), generator=torch.Generator().manual_seed(2))


def test_logits_are_those_of_the_transformers_model() -> None:
    student = Student(model(), 40)
    whole = student.model(input_ids=tokens()[:, :-1], use_cache=False).logits.reshape(-1, 40)
    assert torch.allclose(student.logits(tokens()), whole, atol=1e-6)


def test_a_student_in_bf16_reads_far_positions_as_the_model_does_that_is_opened_from_its_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trained = new_model(ModelShape(1, 64, 1, 1, 48), vocab_size=40, positions=2048, eos_id=0, seed=1)
    cast_weights(trained, torch.bfloat16)
    trained.save_pretrained(tmp_path / "student")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16, local_files_only=True)
    text = torch.randint(0, 40, (1, 2048), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(trained(text).logits, opened(text).logits)
        trained.to(torch.bfloat16)
        assert not torch.equal(trained(text).logits, opened(text).logits), "the frequencies of positions are rounded"


def test_a_start_depends_on_its_seed_and_shape_alone() -> None:
    torch.manual_seed(99)
    first = model()
    torch.rand(7)
    again, other = model(), model(seed=2)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_making_a_model_leaves_the_generator_of_others_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    model()
    assert torch.equal(torch.rand(3), wanted)


def test_padding_rows_are_never_predicted() -> None:
    student = Student(model(vocab_size=64), 40)
    assert student.logits(tokens()).shape == (24, 40)
    targets = DenseTargets(torch.randn(24, 40))
    parts = student(tokens(), targets, 24, temperature=1.0, ce_weight=0.5, kd_weight=0.5)
    parts.loss.backward()
    grad = student.model.get_output_embeddings().weight.grad
    assert grad is not None
    assert not grad[40:].any()
    assert parts.rows == 24


def test_a_model_with_fewer_rows_than_tokens_is_refused() -> None:
    with pytest.raises(RefusedError, match="answers for 40 ids, the data has 41 tokens"):
        Student(model(), 41)


def test_an_architecture_that_rescales_its_logits_is_refused() -> None:
    made = model()
    made.config.final_logit_softcapping = 30.0
    with pytest.raises(RefusedError, match=r"final_logit_softcapping = 30\.0"):
        Student(made, 40)


def test_a_batch_without_anything_to_predict_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"tokens have shape \[3, 1\]"):
        Student(model(), 40).logits(tokens()[:, :1])


def test_targets_of_fewer_rows_are_refused() -> None:
    student = Student(model(), 40)
    with pytest.raises(RefusedError, match="teacher logits have shape"):
        student(tokens(), DenseTargets(torch.randn(23, 40)), 24, temperature=1.0, ce_weight=0.5, kd_weight=0.5)


def test_a_folder_gives_back_the_model_and_one_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path)
    again = model_from_folder(tmp_path)
    assert torch.equal(Student(made, 40).logits(tokens()), Student(again, 40).logits(tokens()))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"lacks 1 tensor\(s\): model\.norm\.weight"):
        model_from_folder(tmp_path)


def test_a_continuation_repeats_what_the_model_prefers() -> None:
    student = Student(model(), 40)
    begun = tokens()[:, :4]
    found = student.continue_greedily(begun, 2)
    assert torch.equal(found[:, :4], begun)
    last = student.logits(torch.cat([begun, begun[:, :1]], dim=1)).reshape(3, 4, 40)[:, -1]
    assert torch.equal(found[:, 4], last.argmax(-1))


def test_activations_that_are_computed_again_give_the_same_bits_and_are_computed_again() -> None:
    found = []
    for again in (False, True):
        student = Student(model(), 40)
        if again:
            student.checkpoint_activations()
        assert student.checkpoints_activations is again
        passes = []
        student.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, made=passes: made.append(1))
        student.train()
        targets = DenseTargets(torch.randn(24, 40, generator=torch.Generator().manual_seed(4)))
        parts = student(
            tokens(), targets, 24, temperature=2.0, ce_weight=0.3, kd_weight=0.7, kernel_backend="reference"
        )
        parts.loss.backward()
        assert len(passes) == (2 if again else 1)
        found.append((parts.loss.detach(), [p.grad for p in student.parameters()]))
    (loss, grads), (same, alike) = found
    assert torch.equal(loss, same)
    assert all(torch.equal(one, other) for one, other in zip(grads, alike, strict=True))


def test_a_model_whose_layers_cannot_be_computed_again_is_refused_by_what_was_asked() -> None:
    student = Student(model(), 40)
    student.model.supports_gradient_checkpointing = False
    with pytest.raises(RefusedError, match="activation_checkpointing = true"):
        student.checkpoint_activations()
