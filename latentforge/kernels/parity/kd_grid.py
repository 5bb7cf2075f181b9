"""The cases on which ``kd_loss`` is compared, by group."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from latentforge.kernels.parity.kd import Case

BF16, FP32 = torch.bfloat16, torch.float32
VOCABULARIES = (151936, 152064, 128256, 50257, 262144)
TEMPERATURES = (1.0, 2.0, 4.0)
DTYPES = (BF16, FP32)


def grid(*, quick: bool = False) -> Iterator[tuple[str, Case]]:
    """(group, case): peaked logits, close pairs, ragged vocabularies, padding, top-k, directions, shapes, edges.

    ``quick`` keeps every group and leaves out the large vocabularies and two of the three temperatures.
    """
    temperatures = (2.0,) if quick else TEMPERATURES
    for dtype, temperature in product(DTYPES, temperatures):
        for vocab in (1003,) if quick else (1003, 50257):
            yield "dense", Case(vocab, dtype, dtype, temperature)
            yield "top-k", Case(vocab, dtype, dtype, temperature, k=32)
            yield "close pair", Case(vocab, dtype, dtype, temperature, noise=0.02, padding=17)
            yield "close pair", Case(vocab, dtype, dtype, temperature, noise=0.02, ce=0.0)
            yield "close pair", Case(vocab, dtype, dtype, temperature, noise=0.02, ce=0.0, k=64)
        yield "mixed precision", Case(2048, BF16, FP32, temperature)
        yield "mixed precision", Case(2048, FP32, BF16, temperature)
        yield "wide logits", Case(2048, dtype, dtype, temperature, width=20.0)
        yield "two temperatures", Case(1003, dtype, dtype, temperature, teacher_temperature=1.5)
        yield "two temperatures", Case(1003, dtype, dtype, temperature, teacher_temperature=1.5, k=16)
    if not quick:
        for number, vocab in enumerate(VOCABULARIES):
            dtype, temperature = DTYPES[number % 2], TEMPERATURES[number % 3]
            yield "ragged vocabulary", Case(vocab, dtype, dtype, temperature, rows=4)
            yield "ragged vocabulary", Case(vocab, dtype, dtype, temperature, rows=4, k=64)
    for dtype, k in product(DTYPES, (None, 24)):
        for direction in ("reverse", "jsd"):
            yield direction, Case(2051, dtype, dtype, 2.0, k=k, direction=direction, beta=0.3)
            yield direction, Case(2051, dtype, dtype, 1.0, k=k, direction=direction, beta=0.7, noise=0.02)
        yield "reverse", Case(2051, dtype, dtype, 2.0, k=k, direction="reverse", padding=9)
        yield "bias, scale, cap", Case(1501, dtype, dtype, 2.0, k=k, bias=True)
        yield "bias, scale, cap", Case(1501, dtype, dtype, 2.0, k=k, logit_scale=0.25)
        yield "bias, scale, cap", Case(1501, dtype, dtype, 1.0, k=k, soft_cap=30.0)
        yield (
            "bias, scale, cap",
            Case(1501, dtype, dtype, 2.0, k=k, bias=True, logit_scale=0.5, soft_cap=30.0, padding=7),
        )
        yield (
            "bias, scale, cap",
            Case(1501, dtype, dtype, 2.0, k=k, bias=True, soft_cap=15.0, direction="reverse", padding=7),
        )
        yield "misaligned", Case(1027, dtype, dtype, 2.0, k=k, misaligned=True)
        yield "misaligned", Case(1027, dtype, dtype, 2.0, k=k, misaligned=True, direction="reverse")
        yield "edges", Case(3001, dtype, dtype, 2.0, k=k, edge="rows")
        yield "edges", Case(3001, dtype, dtype, 2.0, k=k, edge="all masked")
        yield "edges", Case(301, dtype, dtype, 2.0, k=k, rows=0)
    for dtype, direction in product(DTYPES, ("forward", "reverse", "jsd")):
        yield "mixed k", Case(2051, dtype, dtype, 2.0, k=24, rows=7, direction=direction, beta=0.3, edge="mixed k")
        yield "mixed k", Case(2051, dtype, dtype, 1.0, k=150, rows=7, direction=direction, bias=True, edge="mixed k")
    for dtype in DTYPES:
        yield "padding", Case(2100, dtype, dtype, 2.0, padding=52, padded_side="teacher")
        yield "padding", Case(2100, dtype, dtype, 2.0, padding=52, padded_side="student")
        yield "padding", Case(2100, dtype, dtype, 2.0, padding=52, padded_side="student", direction="reverse")
        yield "edges", Case(3001, dtype, dtype, 2.0, edge="rows", direction="reverse")
        yield "edges", Case(500, dtype, dtype, 2.0, edge="excluded by the teacher")
        yield "edges", Case(500, dtype, dtype, 2.0, edge="excluded by the teacher", direction="reverse")
        yield "edges", Case(500, dtype, dtype, 2.0, k=60, edge="k over support")
        yield "edges", Case(130, dtype, dtype, 2.0, k=130)
