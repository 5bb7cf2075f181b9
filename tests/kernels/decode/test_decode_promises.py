"""What decoding promises besides the numbers: bits, draws, odd rows, memory, refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.cpu import decode as cpu
from latentforge.kernels.cpu.variants import VARIANT_VARIABLE
from latentforge.kernels.decode import latent_decode
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.native import native
from latentforge.kernels.weights import Int8Weight, quantize_int8

VARIANTS = list(native().decode_variants())
INF = math.inf


def problem(rows: int, vocab: int, width: int, kind: str) -> tuple[Tensor, Tensor | Int8Weight, Tensor, Tensor]:
    some = torch.Generator().manual_seed(vocab + width)
    hidden = torch.randn(rows, width, generator=some).bfloat16()
    weight = torch.randn(vocab, width, generator=some) / width**0.5
    matrix = quantize_int8(weight) if kind == "int8" else weight.bfloat16() if kind == "bf16" else weight
    return hidden, matrix, torch.arange(rows) * 11 - 5, torch.arange(rows) * 7


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=40, derandomize=True)
@given(
    rows=st.integers(1, 20),
    vocab=st.sampled_from([65, 512, 1700, 5000]),
    width=st.sampled_from([1, 33, 64, 200]),
    kind=st.sampled_from(["bf16", "fp32", "int8"]),
    limits=st.sampled_from([(0.0, None, None), (1.0, None, None), (1.0, 30, 0.9), (1.3, None, 0.95)]),
    data=st.data(),
)
def test_the_bits_of_a_row_depend_neither_on_threads_nor_on_the_other_rows(
    variant: str, rows: int, vocab: int, width: int, kind: str, limits: tuple[Any, Any, Any], data: st.DataObject
) -> None:
    hidden, weight, seeds, positions = problem(rows, vocab, width, kind)
    chosen = DecodeSettings(vocab, *limits)
    ids, logprobs = cpu.decode(hidden, weight, chosen, seeds, positions, None, isa=variant, threads=1)
    more = cpu.decode(hidden, weight, chosen, seeds, positions, None, isa=variant, threads=data.draw(st.integers(2, 5)))
    assert torch.equal(ids, more[0])
    assert torch.equal(logprobs, more[1])
    some = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows)))
    part = cpu.decode(hidden[some], weight, chosen, seeds[some], positions[some], None, isa=variant, threads=1)
    assert torch.equal(ids[some], part[0])
    assert torch.equal(logprobs[some], part[1])


def test_int8_has_the_same_bits_in_every_variant() -> None:
    for width in (5, 64, 300):
        hidden, weight, seeds, positions = problem(11, 2100, width, "int8")
        for limits in ((0.0, None, None), (0.8, None, None), (1.0, 300, 0.97)):
            chosen = DecodeSettings(2100, *limits)
            found = [cpu.decode(hidden, weight, chosen, seeds, positions, None, isa=isa) for isa in VARIANTS]
            for ids, logprobs in found[1:]:
                assert torch.equal(ids, found[0][0])
                assert torch.equal(logprobs, found[0][1])


def chi_squared(ids: Tensor, probabilities: Tensor) -> float:
    """In standard deviations from its mean."""
    counts = torch.bincount(ids, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(ids)
    inside = expected > 0
    assert not bool(counts[~inside].any())
    statistic = float(((counts - expected)[inside] ** 2 / expected[inside]).sum())
    freedom = int(inside.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (2.0, None, None), (1.0, 9, 0.9)])
def test_draws_have_the_frequencies_of_the_softmax(temperature: float, top_k: int | None, top_p: float | None) -> None:
    draws, vocab = 20_000, 30
    z = torch.linspace(1.5, -1.5, vocab)
    found = latent_decode(
        torch.ones(draws, 1),
        z[:, None].contiguous(),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=torch.full((draws,), 42),
        positions=torch.arange(draws),
    )
    kept = z / temperature
    if top_k is not None:
        kept = kept.masked_fill(torch.arange(vocab) >= top_k, -INF)
    p = torch.softmax(kept, 0)
    if top_p is not None:
        p = torch.where(p.cumsum(0) - p < top_p, p, 0.0)
    assert abs(chi_squared(found.ids, p / p.sum())) < 4
    # The planted fault: a temperature that is 30 % off.
    wrong = torch.softmax(kept / 1.3, 0) * (p > 0)
    assert abs(chi_squared(found.ids, wrong / wrong.sum())) > 4
    torch.testing.assert_close(
        found.logprobs, torch.log_softmax(z / temperature, 0)[found.ids], rtol=0, atol=1e-5, msg="before the limits"
    )


def test_a_draw_is_repeated_by_its_seed_and_position_and_changed_by_either() -> None:
    hidden, weight, _, _ = problem(64, 700, 32, "bf16")
    seeds, positions = torch.full((64,), 9), torch.arange(64)
    first = latent_decode(hidden, weight, temperature=2.0, seeds=seeds, positions=positions).ids
    again = latent_decode(hidden, weight, temperature=2.0, seeds=seeds, positions=positions).ids
    assert torch.equal(first, again)
    for other in ((seeds + 1, positions), (seeds, positions + 1000), (seeds - 2**40, positions)):
        ids = latent_decode(hidden, weight, temperature=2.0, seeds=other[0], positions=other[1]).ids
        assert int((ids != first).sum()) > 40


@pytest.mark.parametrize("backend", ["reference", *VARIANTS])
@pytest.mark.parametrize("kind", ["bf16", "fp32", "int8"])
@pytest.mark.parametrize("limits", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}])
def test_rows_without_an_answer_say_so_and_leave_the_others_alone(
    backend: str, kind: str, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "reference":
        monkeypatch.setenv(VARIANT_VARIABLE, backend)
    hidden, weight, seeds, positions = problem(6, 300, 40, kind)
    options = {**limits, "backend": "reference" if backend == "reference" else "cpu"}
    if limits:
        options |= {"seeds": seeds, "positions": positions}
    clean = latent_decode(hidden, weight, **options)
    spoilt = hidden.clone()
    spoilt[1, 3], spoilt[4, 39] = math.nan, INF
    found = latent_decode(spoilt, weight, **options)
    assert found.ids[[1, 4]].tolist() == [-1, -1]
    assert bool(found.logprobs[[1, 4]].isnan().all())
    rest = [0, 2, 3, 5]
    assert torch.equal(found.ids[rest], clean.ids[rest])
    assert torch.equal(found.logprobs[rest], clean.logprobs[rest])
    nothing = latent_decode(hidden, weight, bias=torch.full((300,), -INF), **options)
    assert nothing.ids.tolist() == [-1] * 6
    assert bool(nothing.logprobs.isnan().all())
    bias = torch.full((300,), -INF)
    bias[137] = 0.25
    for cap in (None, 5.0):
        only = latent_decode(hidden, weight, bias=bias, soft_cap=cap, **options)
        assert only.ids.tolist() == [137] * 6
        assert only.logprobs.tolist() == [0.0] * 6
    bias[5] = INF
    assert latent_decode(hidden, weight, bias=bias, **options).ids.tolist() == [-1] * 6
    # A cap makes plus infinity a number again.
    assert latent_decode(hidden, weight, bias=bias, soft_cap=20.0, **options).ids.tolist() != [-1] * 6


@pytest.mark.parametrize("backend", ["reference", *VARIANTS])
@pytest.mark.parametrize("limits", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}])
def test_one_logit_that_is_nan_leaves_a_row_without_an_answer(
    backend: str, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where all are NaN nothing is finite either: only one alone shows that NaN is looked for, with either sign.
    if backend != "reference":
        monkeypatch.setenv(VARIANT_VARIABLE, backend)
    name = "reference" if backend == "reference" else "cpu"
    for kind in ("bf16", "fp32", "int8"):
        hidden, weight, seeds, positions = problem(3, 300, 40, kind)
        options = {**limits, "backend": name} | ({"seeds": seeds, "positions": positions} if limits else {})
        for place in (0, 137, 299):
            for sign in (1.0, -1.0):
                bias = torch.zeros(300)
                bias[place] = math.copysign(math.nan, sign)
                found = latent_decode(hidden, weight, bias=bias, **options)
                assert found.ids.tolist() == [-1] * 3, (kind, place, sign)
                assert bool(found.logprobs.isnan().all())
        row = torch.zeros(300)
        row[[137, 138]] = torch.tensor([math.nan, -INF])
        assert latent_decode(hidden, weight, bias=row, **options).ids.tolist() == [-1] * 3


@pytest.mark.parametrize("backend", ["reference", *VARIANTS])
def test_equal_logits_give_the_lowest_id(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "reference":
        monkeypatch.setenv(VARIANT_VARIABLE, backend)
    name = "reference" if backend == "reference" else "cpu"
    for spots in ([3, 4], [0, 63], [63, 64], [511, 512], [700, 1600], [1599, 2047]):
        weight = torch.zeros(2100, 1)
        weight[spots] = 2.0
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert latent_decode(torch.ones(1, 1), weight, backend=name).ids.tolist() == [spots[0]]
    torch.set_num_threads(1)
    zeros = torch.tensor([-0.0, 0.0, -0.0])[:, None]
    assert latent_decode(torch.ones(1, 1), zeros, backend=name).ids.tolist() == [0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_padding_is_neither_chosen_nor_counted(backend: str) -> None:
    hidden, weight, _, _ = problem(5, 515, 16, "fp32")
    assert isinstance(weight, Tensor)
    weight[510:] = 50 * hidden[:1].float()  # what lies in the padding would win
    found = latent_decode(hidden, weight, vocab=510, backend=backend)
    cut = latent_decode(hidden, weight[:510].contiguous(), backend=backend)
    assert torch.equal(found.ids, cut.ids)
    assert torch.equal(found.logprobs, cut.logprobs)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_rows_give_no_tokens(backend: str) -> None:
    found = latent_decode(torch.zeros(0, 8), torch.randn(20, 8), backend=backend)
    assert found.ids.shape == found.logprobs.shape == (0,)
    assert (found.ids.dtype, found.logprobs.dtype) == (torch.int64, torch.float32)


def test_a_hidden_of_any_strides_is_the_same_rows() -> None:
    hidden, weight, _, _ = problem(6, 300, 24, "bf16")
    wanted = latent_decode(hidden, weight)
    for other in (hidden.T.contiguous().T, torch.stack([hidden, hidden], 2)[:, :, 0], hidden.repeat(1, 2)[:, 24:]):
        assert not other.is_contiguous()
        found = latent_decode(other, weight)
        assert torch.equal(found.ids, wanted.ids)
        assert torch.equal(found.logprobs, wanted.logprobs)


_PEAK = """
import sys, torch
from latentforge.kernels.cpu import decode as cpu
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
from latentforge.kernels.decode_settings import DecodeSettings
rows, vocab = 512, 65536
hidden, weight = torch.randn(rows, 8).bfloat16() * float(sys.argv[1]), torch.randn(vocab, 8).bfloat16()
key = torch.arange(rows)
limits = [(0.0, None, None), (1.0, None, None), (1.0, 50, 0.9), (1.0, None, 0.9), (1.0, 30000, None)]
cpu.decode(hidden[:2], weight, DecodeSettings(vocab), key[:2], key[:2], None, threads=2)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here: that of the imports would hide a growth
before = peak()
for each in limits[: int(sys.argv[2])]:
    cpu.decode(hidden, weight, DecodeSettings(vocab, *each), key, key, None, threads=2)
if sys.argv[3] == "fault":
    (hidden.float() @ weight.float().T).sum()
print((peak() - before) / (rows * vocab * 4))
"""


@pytest.mark.parametrize(("spread", "how_many"), [("1.0", 3), ("0.01", 5)])
def test_nothing_of_the_size_of_the_logits_is_allocated(spread: str, how_many: int) -> None:
    def share(fault: str) -> float:
        command = [sys.executable, "-c", _PEAK, spread, str(how_many), fault]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert share("no fault") < 0.25  # of the logits in fp32
    if how_many == 3:
        assert share("fault") > 0.5


def good() -> dict[str, Any]:
    return {"hidden": torch.randn(3, 8), "weight": torch.randn(20, 8)}


KEY = {"temperature": 1.0, "seeds": torch.arange(3), "positions": torch.arange(3)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.randn(3, 9)}, r"\[3, 9\]"),
        ({"hidden": torch.randn(8)}, r"\[8\]"),
        ({"hidden": torch.zeros(3, 8, dtype=torch.float16)}, "float16"),
        ({"weight": torch.zeros(20, 8, dtype=torch.float16)}, "float16"),
        ({"weight": torch.zeros(20, 8, dtype=torch.int8)}, "int8"),
        ({"weight": torch.zeros(0, 8)}, r"\[0, 8\]"),
        ({"hidden": torch.zeros(3, 0), "weight": torch.zeros(20, 0)}, r"\[20, 0\]"),
        ({"weight": torch.randn(8, 20).T}, "column stride 20"),
        ({"temperature": -1.0, **{k: KEY[k] for k in ("seeds", "positions")}}, "-1.0"),
        ({**KEY, "temperature": 1e-9}, "1e-09"),
        ({**KEY, "temperature": math.nan}, "nan"),
        ({**KEY, "temperature": INF}, "inf"),
        ({**KEY, "seeds": None}, "seeds = None"),
        ({**KEY, "positions": None}, "positions = None"),
        ({**KEY, "seeds": torch.arange(3, dtype=torch.int32)}, "int32"),
        ({**KEY, "positions": torch.arange(4)}, r"\[4\]"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_k": -5}, "top_k = -5"),
        ({"top_k": 2.5}, "top_k = 2.5"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"bias": torch.zeros(19)}, r"\[19\]"),
        ({"bias": torch.zeros(20, dtype=torch.int64)}, "int64"),
        ({"logit_scale": 0.0}, "logit_scale = 0.0"),
        ({"logit_scale": INF}, "logit_scale = inf"),
        ({"soft_cap": -3.0}, "soft_cap = -3.0"),
        ({"vocab": 0}, "vocab = 0"),
        ({"vocab": 21}, "vocab = 21"),
        ({"backend": "tpu"}, "tpu"),
        ({"backend": "cpu", "hidden": torch.zeros(3, 8, dtype=torch.float64)}, "fp64"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    latent_decode(**good())
    latent_decode(**good(), **KEY)
    with pytest.raises(RefusedError, match=words):
        latent_decode(**{**good(), **change})


def test_weights_that_have_no_int8_form_are_refused() -> None:
    weight = torch.randn(9000, 4)
    weight[8191, 2] = math.nan
    with pytest.raises(RefusedError, match="nan in row 8191"):
        quantize_int8(weight)
    weight[8191, 2], weight[17, 0] = 0.0, -INF
    with pytest.raises(RefusedError, match="-inf in row 17"):
        quantize_int8(weight)
    with pytest.raises(RefusedError, match="int64"):
        quantize_int8(torch.zeros(3, 3, dtype=torch.int64))
    whole = quantize_int8(torch.randn(5, 4))
    with pytest.raises(RefusedError, match=r"\[4\]"):
        Int8Weight(whole.values, whole.scales[:4])
    with pytest.raises(RefusedError, match="float32 \\[5, 4\\]"):
        Int8Weight(torch.zeros(5, 4), whole.scales)


def test_limits_that_the_integers_set_are_refused() -> None:
    with pytest.raises(RefusedError, match="65537"):
        cpu.decode(
            torch.zeros(1, 65537), quantize_int8(torch.ones(1, 65537)), DecodeSettings(1), None, None, None, threads=1
        )
    with pytest.raises(RefusedError, match="2097153"):
        cpu.decode(torch.zeros(1, 1), torch.zeros(2097153, 1), DecodeSettings(2097153), None, None, None)


def test_a_variant_that_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIANT_VARIABLE, "sparc")
    with pytest.raises(RefusedError, match="sparc"):
        latent_decode(**good(), backend="cpu")
