"""Checks of F-BACKEND-SELECT: the default runs on the GPU, what is asked is obeyed, it is fast, it is the teacher."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from latentforge.contracts import Finding
from latentforge.errors import LatentForgeError

STEP_ROWS, STEP_LENGTH = 16, 512
"""A step of a 7B teacher: 8192 tokens."""
_NOISE_DRAWS = 5
_WITHIN = 2.0


def default_takes_the_fast_path(*, mutant: str | None = None) -> Finding:
    """Recorded situations decided as their figures say, and on this machine the path that was chosen is the one in use.

    Mutants: ``by_name`` (a quantised teacher takes the quantised path), ``na_is_idle`` (N/A read as zero).
    """
    from latentforge.teachers.precision import PrecisionChoice, Trial, choose_precision, open_hf

    def decide(trials: list[Trial]) -> PrecisionChoice:
        if mutant == "by_name":
            trials = [one for one in trials if one.precision == "quantized"] or trials
        if mutant == "na_is_idle":
            trials = [Trial(t.precision, t.tokens_per_second, t.utilisation or 0.0, t.refused) for t in trials]
        return choose_precision("auto", trials, gpu=True)

    # As hosts reported them: utilisation is told on a GB10 more often than memory, and N/A where a container hides it.
    situations = {
        "quantised on the CPU": ([Trial("quantized", 41.0, 0.0), Trial("bf16", 3900.0, 97.0)], "bf16"),
        "quantised, fast on the CPU": ([Trial("quantized", 5200.0, 2.0), Trial("bf16", 3900.0, 97.0)], "bf16"),
        "quantised on the GPU": ([Trial("quantized", 6200.0, 95.0), Trial("bf16", 3100.0, 96.0)], "quantized"),
        "N/A on one": ([Trial("quantized", 6200.0, None), Trial("bf16", 3100.0, 96.0)], "quantized"),
        "no kernel": ([Trial("quantized", refused="no kernel image"), Trial("bf16", 3100.0, None)], "bf16"),
        "plain numbers": ([Trial("fp32", 1500.0, 99.0), Trial("bf16", 3100.0, 96.0)], "bf16"),
    }
    wrong = {}
    for name, (trials, expected) in situations.items():
        try:
            taken: str = decide(trials).precision
        except LatentForgeError as error:
            taken = f"refused: {error}"
        if taken != expected:
            wrong[name] = f"{taken} instead of {expected}"
    device = _device()
    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as name:
        _tiny(Path(name))
        teacher = open_hf(Path(name), "auto", device)
        choice, found = teacher.choice, str(teacher.model.dtype).removeprefix("torch.")
        used = {"float32": "fp32", "bfloat16": "bf16"}.get(found, found)
        where = teacher.model.device.type
    said = None if choice is None else choice.precision
    if (said, where) != (used, device):
        wrong["this machine"] = f"{said} on {device} was chosen, {used} on {where} computes"
    text = f"{len(situations)} situations as measured; here {used} on {where}"
    text = "; ".join(f"{name}: {what}" for name, what in wrong.items()) or text
    return Finding(not wrong, text, {"situations": len(situations), "here": used, "device": where, "wrong": wrong})


def override_works(*, mutant: str | None = None) -> Finding:
    """Each precision that is asked for is the one that computes, and shows in the teacher's identity.

    ``mutant="ignored"`` plants a loader that takes the default whatever is asked.
    """
    from latentforge.teachers.precision import open_hf
    from latentforge.teachers.rounding import round_folder

    expected = {"fp32": "float32", "bf16": "bfloat16", "quantized": "fp8/bfloat16"}
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as name:
        plain, packed = Path(name, "plain"), Path(name, "packed")
        plain.mkdir()
        _tiny(plain)
        round_folder(plain, packed)
        asked: Any
        for asked in expected:
            folder = packed if asked == "quantized" else plain
            try:
                teacher = open_hf(folder, "auto" if mutant == "ignored" else asked, _device())
            except LatentForgeError as error:
                if asked == "quantized" and "does not load here" in str(error):
                    continue  # refused by its name, with the package that is missing
                raise
            kept = str(teacher.model.dtype).removeprefix("torch.")
            told = teacher.identity.quantization
            found[asked] = told if told.endswith(kept) else f"{told}, computed in {kept}"
    wrong = {asked: value for asked, value in found.items() if value != expected[asked]}
    text = ", ".join(f"{asked}: {value}" for asked, value in found.items())
    return Finding(not wrong, text, {"found": found, "wrong": wrong})


def steps_in_time(
    *, steps: int = 500, minutes: float = 30.0, shape: str = "7b", device: str = "cuda", mutant: str | None = None
) -> Finding:
    """``steps`` forward passes of a teacher of 7 G parameters within ``minutes``, from the rate of measured ones.

    Weights are random numbers in bf16: their values cost nothing. ``mutant="cpu"`` computes beside the GPU, as the
    teacher of that night did. ``shape="tiny"`` and ``device="cpu"`` let the check itself be tried anywhere.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    sizes = {
        "7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
               "intermediate_size": 18_944, "vocab_size": 152_064},
        "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "intermediate_size": 128, "vocab_size": 512},
    }[shape]  # fmt: skip
    where = torch.device("cpu" if mutant == "cpu" else device)
    rows, length = (1, 32) if mutant == "cpu" else (STEP_ROWS, STEP_LENGTH)
    with torch.device(where):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes), dtype=torch.bfloat16).eval()
        tokens = torch.randint(0, sizes["vocab_size"], (rows, length))

    def step() -> None:
        with torch.no_grad():
            for part in tokens.split(4):
                model(input_ids=part, use_cache=False)
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    step()
    began, done = time.perf_counter(), 0
    while done < 2 or (time.perf_counter() - began < 3.0 and done < 20):
        step()
        done += 1
    rate = done * tokens.numel() / (time.perf_counter() - began)
    needed = steps * STEP_ROWS * STEP_LENGTH / rate / 60
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = f"{steps} steps of {STEP_ROWS} x {STEP_LENGTH} tokens take {needed:.1f} min at {rate:.0f} tokens/s"
    measured = {"minutes": needed, "tokens_per_second": rate, "parameters": parameters, "device": where.type}
    return Finding(needed <= minutes, f"{text} ({parameters / 1e9:.1f} G parameters, {where.type})", measured)


def quantised_within_its_noise(*, mutant: str | None = None) -> Finding:
    """A teacher rounded to FP8 is as far from full precision as random noise of the format's steps, at most twice.

    Both are computed in fp32 from the same weights: mean KL(full || rounded) over 72 positions against the median of
    five draws of noise. Mutants, in one layer's MLP: ``swapped`` (the scales stand at the wrong blocks), ``halved``
    (they are half of what they were).
    """
    import torch

    from latentforge.teachers.checks import _tokens
    from latentforge.teachers.hf import HFTeacher
    from latentforge.teachers.rounding import noisy, round_folder

    def change(name: str, scales: torch.Tensor) -> torch.Tensor:
        if mutant is None or "layers.1.mlp" not in name:
            return scales
        return scales * 0.5 if mutant == "halved" else scales.flip((0, 1))

    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as name:
        plain, packed = Path(name, "plain"), Path(name, "packed")
        plain.mkdir()
        vocabulary = _tiny(plain)
        names = round_folder(plain, packed, change=change)
        tokens = _tokens(vocabulary)
        full = HFTeacher.open(plain)
        want = torch.log_softmax(full.logits(tokens).double(), dim=-1)
        rounded = _kl(want, HFTeacher.open(packed).logits(tokens))
        floors = []
        weights = dict(full.model.named_parameters())
        kept = {one: weights[one].clone() for one in names}
        for seed in range(_NOISE_DRAWS):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for one in names:
                    weights[one].copy_(noisy(kept[one], generator))
            floors.append(_kl(want, full.logits(tokens)))
    floor = sorted(floors)[_NOISE_DRAWS // 2]
    text = f"KL(full || fp8) {rounded:.2e} nats, noise of its steps {floor:.2e} (ratio {rounded / floor:.2f})"
    return Finding(rounded <= _WITHIN * floor, text, {"kl": rounded, "floor": floor, "draws": floors})


def _kl(want: Any, logits: Any) -> float:
    import torch

    have = torch.log_softmax(logits.double(), dim=-1)
    return float((want.exp() * (want - have)).sum(-1).mean())


def _tiny(folder: Path) -> int:
    """A tiny teacher in ``folder``; returns its vocabulary."""
    from latentforge.teachers.checks import _VOCABULARY, _tiny_model

    _tiny_model(folder, seed=1)
    return _VOCABULARY


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
