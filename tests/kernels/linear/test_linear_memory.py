"""Nothing of the size [N, V]: what linear_kd_loss allocates beside its gradients stays within chunk_rows rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from latentforge.kernels import DenseTargets, LinearTargets, linear_kd_loss, linear_sweeps
from latentforge.kernels.targets import topk_targets

ROWS, VOCAB, WIDTH = 256, 6000, 24
CHUNK = 32


def peak(kind: str, *, chunk_rows: int = CHUNK, trained: bool = True, grad: bool = True, ignored: bool = False) -> int:
    """Most bytes that torch held at one time in one call beyond what it held before, gradients included."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).bfloat16().requires_grad_(trained)
    logits = torch.randn(ROWS, VOCAB, generator=generator)
    targets: Any = {
        "dense": DenseTargets(logits.bfloat16()),
        "topk": topk_targets(logits, 8, 2.0),
        "linear": LinearTargets(torch.randn(ROWS, 12), torch.randn(VOCAB, 12)),
    }[kind]
    labels = torch.zeros(ROWS, dtype=torch.int64)
    if ignored:
        labels[::3] = -100
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, torch.set_grad_enabled(grad):
        found = linear_kd_loss(
            hidden,
            weight,
            targets,
            labels,
            temperature=2.0,
            ce_weight=0.3,
            kd_weight=0.7,
            denominator=float(ROWS),
            chunk_rows=chunk_rows,
            backend="cpu",
        )
    held = most = 0
    assert recorded.profiler is not None
    events = [e for root in recorded.profiler.kineto_results.experimental_event_tree() for e in flat(root)]
    for event in sorted(events, key=lambda e: e.start_time_ns):
        held += event.extra_fields.alloc_size
        most = max(most, held)
    assert most > 0
    del found
    return most


def flat(event: Any) -> Iterator[Any]:
    if event.name == "[memory]":
        yield event
    for child in event.children:
        yield from flat(child)


# Gradients, [N, H] and [N, k] temporaries, and one tile of the weight in fp32.
SMALL = 2 * (ROWS + VOCAB) * WIDTH + 40 * ROWS * (WIDTH + 12) + 4 * 2048 * (WIDTH + 12) + 300_000


def allowed(chunk_rows: int) -> int:
    return chunk_rows * VOCAB * 4 + SMALL


@pytest.mark.parametrize(
    "how",
    [{}, {"trained": False}, {"grad": False}, {"ignored": True}, {"ignored": True, "trained": False}],
    ids=["trained", "frozen", "no grad", "rows ignored", "frozen, rows ignored"],
)
@pytest.mark.parametrize("chunk_rows", [CHUNK, 2 * CHUNK])  # two sweeps; for top-k sums that are kept
@pytest.mark.parametrize("kind", ["dense", "topk", "linear"])
def test_at_most_chunk_rows_of_logits_are_held(kind: str, chunk_rows: int, how: dict[str, bool]) -> None:
    assert allowed(chunk_rows) < 0.5 * ROWS * VOCAB * 4
    assert peak(kind, chunk_rows=chunk_rows, **how) <= allowed(chunk_rows)


@pytest.mark.parametrize("kind", ["dense", "topk", "linear"])
def test_logits_of_all_rows_would_be_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        linear_sweeps.Plan, "of", staticmethod(lambda problem, rows, want: linear_sweeps.Plan(ROWS, False, False))
    )
    assert peak(kind) > ROWS * VOCAB * 4


def test_a_wider_tile_of_all_rows_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_sweeps, "TILE_TEMPORARIES", 1)
    assert peak("linear") > allowed(CHUNK)


CHILD = """
import torch
from latentforge.kernels import linear_kd_loss
from latentforge.kernels.targets import TopKTargets

torch.set_num_threads(1)
rows, vocab, width, k = 512, 20000, 16, 16
hidden = torch.randn(rows, width).bfloat16().requires_grad_()
weight = torch.randn(vocab, width).bfloat16().requires_grad_()
ids = torch.arange(k).expand(rows, k).contiguous()
logprobs = torch.randn(rows, k).log_softmax(-1) - 0.1
labels = torch.zeros(rows, dtype=torch.int64)

def loss(count, chunk_rows):
    targets = TopKTargets(ids[:count], logprobs[:count], torch.full((count,), -1.0))
    return linear_kd_loss(
        hidden[:count], weight, targets, labels[:count], temperature=2.0, ce_weight=0.3, kd_weight=0.7,
        denominator=1.0, chunk_rows=chunk_rows, backend="cpu",
    )

def high_water():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

for chunk_rows in (32, 512):
    loss(rows, chunk_rows)  # code pages, tables and thread-local buffers are in before anything is measured
for chunk_rows in (32, 512):
    open("/proc/self/clear_refs", "w").write("5")
    before = high_water()
    found = loss(rows, chunk_rows)
    print(high_water() - before)
    del found
"""


def test_the_process_does_not_grow_by_the_logits() -> None:
    # In a process of its own, by the resident set: what C++ allocates counts too. The allocator gives back at once what
    # is freed; else the first call would leave its pages to the ones that are measured.
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, env=given_back)
    in_chunks, at_once = (int(line) for line in found.stdout.split())
    logits = 512 * 20000 * 4
    assert in_chunks < 0.5 * logits
    assert at_once > 0.9 * logits
