"""A folder in any dtype, and quantised where transformers loads it here; else refused with what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from latentforge.data import ShardSet
from latentforge.errors import RefusedError
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.precision import open_hf
from latentforge.teachers.rounding import noisy, round_folder


@pytest.fixture(scope="module")
def fp8_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with its layers' matrices in FP8."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    assert len(round_folder(teacher_folder, folder)) == 14
    return folder


def logprobs(teacher: HFTeacher) -> torch.Tensor:
    tokens = torch.arange(2 * 12).reshape(2, 12) + 40
    return torch.log_softmax(teacher.logits(tokens).double(), dim=-1)


@pytest.mark.parametrize(
    ("asked", "dtype", "worst"), [("auto", "float32", 1e-6), ("fp32", "float32", 1e-6), ("bf16", "bfloat16", 0.5)]
)
def test_a_folder_is_computed_in_the_precision_that_is_asked_for(
    teacher_folder: Path, asked: Any, dtype: str, worst: float
) -> None:
    teacher = open_hf(teacher_folder, asked, "cpu")
    assert str(teacher.model.dtype) == f"torch.{dtype}"
    assert teacher.identity.quantization == dtype
    assert teacher.choice is not None
    assert teacher.choice.asked == asked
    difference = float((logprobs(teacher) - logprobs(HFTeacher.open(teacher_folder))).abs().max())
    assert difference <= worst
    assert (difference > 0) is (dtype == "bfloat16")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_folder_kept_in_16_bits_is_computed_in_fp32_without_a_gpu(
    make_model: Any, tmp_path: Path, stored: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    make_model(tmp_path / "model")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=stored)
    half.save_pretrained(tmp_path / "model")
    teacher = open_hf(tmp_path / "model", "auto", "cpu")
    assert teacher.model.dtype == torch.float32
    assert torch.equal(teacher.model.model.norm.weight, half.model.norm.weight.float())
    assert torch.equal(teacher.model.lm_head.weight, half.lm_head.weight.float())


def test_a_quantised_folder_answers_as_its_rounded_weights_do(teacher_folder: Path, fp8_folder: Path) -> None:
    """What transformers makes of the folder is held against the rounding by hand, matrix by matrix."""
    packed, plain = open_hf(fp8_folder, "auto", "cpu"), HFTeacher.open(teacher_folder)
    assert packed.choice is not None
    assert packed.choice.precision == "quantized"
    assert packed.choice.reason.startswith("no GPU: quantized")
    assert packed.identity.quantization == "fp8/bfloat16"
    assert any("fp8 weights are expanded to bfloat16" in note for note in packed.notes)
    originals = dict(plain.model.named_parameters())
    for name, weight in packed.model.named_parameters():
        if "_proj" not in name:
            continue
        error = (weight.float() - originals[name]).abs()
        block = originals[name].abs().max()
        assert 0 < float(error.max()) <= float(block) / 16 + 1e-6  # half a step of three bits of mantissa
    want, have = logprobs(plain), logprobs(packed)
    assert 0 < float((want.exp() * (want - have)).sum(-1).mean()) < 0.2


def test_a_quantised_folder_in_fp32_has_its_rounding_and_no_other(fp8_folder: Path) -> None:
    exact, half = (open_hf(fp8_folder, asked, "cpu") for asked in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert (exact.kept, exact.model.dtype) == ("expanded", torch.float32)
    for (name, one), (_, other) in zip(exact.model.named_parameters(), half.model.named_parameters(), strict=True):
        assert torch.equal(one.to(torch.bfloat16), other), name
    assert exact.identity.quantization == "fp8/float32"


@pytest.mark.parametrize(
    ("method", "config", "said", "next_"),
    [
        ("gptq", {"bits": 4}, "gptq", "pip install"),
        ("compressed-tensors", {"format": "int-quantized", "config_groups": {}}, "compressed-tensors", "pip install"),
        ("nonsense", {}, "nonsense", "vllm-local"),
    ],
)
def test_a_method_that_does_not_load_here_is_refused_by_its_name_with_what_is_missing(
    teacher_folder: Path, tmp_path: Path, method: str, config: dict[str, Any], said: str, next_: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(teacher_folder, folder)
    written = json.loads((folder / "config.json").read_bytes())
    written["quantization_config"] = {"quant_method": method, **config}
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(RefusedError, match=f"quantised by '{said}', which transformers does not load here") as refused:
        open_hf(folder, "auto", "cpu")
    assert next_ in (refused.value.next or "")


def test_quantized_of_a_plain_folder_is_refused(teacher_folder: Path) -> None:
    with pytest.raises(RefusedError, match="is not quantised"):
        open_hf(teacher_folder, "quantized", "cpu")


def test_noise_is_within_half_a_step_of_the_format() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(40, 56, generator=generator)
    moved = noisy(weight, generator)
    assert not torch.equal(moved, weight)
    assert float(((moved - weight).abs() / weight.abs().clamp(min=1e-3)).max()) <= 1 / 16 + 0.35  # subnormals: more
    assert float((moved - weight).abs().max()) <= float(weight.abs().max()) / 16


def test_scoring_a_quantised_teacher_fills_a_store_of_its_own(fp8_folder: Path, shards: ShardSet) -> None:
    teacher = open_hf(fp8_folder, "auto", "cpu")
    rows = list(teacher.score([shards.train.rows([0])[0]], k=4, temperatures=(1.0,)))
    assert rows[0][0] == 0
    assert teacher.identity != open_hf(fp8_folder, "fp32", "cpu").identity
