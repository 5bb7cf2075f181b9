"""Checks that contracts name: what the store of targets gives back is what was put in, or a refusal."""

from __future__ import annotations

import sqlite3
import tempfile
from pathlib import Path
from typing import Any

from latentforge.contracts import Finding
from latentforge.errors import RefusedError

_VOCABULARY = 300
_K = 4


def damaged_row_never_reads_wrong(*, forge_checksum: bool = False) -> Finding:
    """Rows with one byte changed, cut short, or moved under another key are refused.

    ``forge_checksum=True`` plants the damage that a checksum does not see, by writing a matching one.
    """
    import numpy as np

    from latentforge.targets.row import pack_row
    from latentforge.targets.store import TargetStore

    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as name:
        path = Path(name) / "targets.sqlite"
        with TargetStore.create(path, {"model": "check"}, _K, [1.0], vocab_size=_VOCABULARY) as store:
            sequences = [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]
            rows = [(_array(tokens), _targets(seed)) for seed, tokens in enumerate(sequences)]
            store.put_many(rows)
            (key, other), value = [store.key(tokens) for tokens, _ in rows], b""
        with TargetStore.open(path) as store:
            right = store.get(rows[0][0]).logprobs
        value = _value(path, key)
        damaged = [value[:at] + bytes([value[at] ^ 0x10]) + value[at + 1 :] for at in range(len(value))]
        damaged += [value[:at] for at in range(len(value))] + [_value(path, other)]
        if forge_checksum:
            damaged = [pack_row(key, rows[1][1])]
        refused = 0
        for wrong in damaged:
            _set_value(path, key, wrong)
            with TargetStore.open(path) as store:
                try:
                    store.get(rows[0][0])
                except RefusedError:
                    refused += 1
        _set_value(path, key, value)
        with TargetStore.open(path) as store:
            whole = np.array_equal(store.get(rows[0][0]).logprobs, right)
    text = f"{refused} of {len(damaged)} damaged rows refused; the row put back reads {'right' if whole else 'wrong'}"
    return Finding(refused == len(damaged) and whole, text, {"refused": refused, "damaged": len(damaged)})


def rounding_spares_the_gradient(*, temperature: float = 1.0, coarser: int = 1) -> Finding:
    """The KD gradient from stored rows is that from the rows as given, to 1 %, for students near and far.

    ``coarser`` plants steps that are so many times as wide.
    """
    import torch

    from latentforge.targets.bench import DISTANCES, gradient_error
    from latentforge.targets.levels import GradedLevels
    from latentforge.targets.row import GRADED

    vocabulary, rows, k = 8192, 16, 50
    generator = torch.Generator().manual_seed(10)
    places = torch.stack([torch.randperm(vocabulary, generator=generator)[:64] for _ in range(rows)])
    floor = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * 1.5
    levels = GradedLevels(GRADED.finest * coarser, min(GRADED.coarsest * coarser, 0.99))
    errors = {}
    # A broad row, one as a language model's mostly are, and one that is nearly sure.
    for name, top in (("flat", 6.0), ("usual", 11.0), ("peaked", 18.0)):
        heights = torch.linspace(top, 3.0, 64, dtype=torch.float64).expand(rows, -1)
        logits = floor.scatter(-1, places, heights)
        for distance in DISTANCES:
            # At T = 2 unlikely tokens, whose steps are wide, have the larger share; the nearest student is left out.
            if temperature == 1.0 or distance > min(DISTANCES):
                errors[f"{name}, {distance:g}"] = gradient_error(
                    logits, k=k, temperature=temperature, distance=distance, levels=levels
                )
    worst = max(errors, key=lambda case: errors[case])
    return Finding(
        errors[worst] < 0.01,
        f"worst {errors[worst]:.2%} at T = {temperature:g} ({worst} nats; {len(errors)} cases, bound 1 %)",
        {"errors": errors, "temperature": temperature, "k": k, "bound": 0.01},
    )


def keys_stand_on_everything(*, left_out: str | None = None) -> Finding:
    """A row is found by what it depends on and by nothing else. ``left_out`` plants a key without that parameter."""
    from latentforge.targets.store import TargetStore

    made_for = {
        "identity": {"model": "check", "sha256": "a" * 64, "quantization": "float32", "tokenizer_sha256": "b" * 64},
        "k": _K,
        "temperatures": [1.0],
        "vocab_size": _VOCABULARY,
        "mode": "sample",
        "draws": 8,
        "seed": 1,
    }
    identity = made_for["identity"]
    assert isinstance(identity, dict)
    changes: dict[str, dict[str, Any]] = {
        "teacher's content": {"identity": {**identity, "sha256": "c" * 64}},
        "teacher's numbers": {"identity": {**identity, "quantization": "bfloat16"}},
        "tokenizer": {"identity": {**identity, "tokenizer_sha256": "d" * 64}},
        "k": {"k": _K + 1},
        "mode": {"mode": "topk"},
        "draws": {"draws": 9},
        "seed": {"seed": 2},
        "temperature": {"mode": "topk", "temperatures": [2.0]},
    }
    tokens = _array([1, 2, 3, 4])
    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as name:

        def key_of(number: int, changed: dict[str, Any], sequence: Any) -> bytes:
            asked = {**made_for, **{n: v for n, v in changed.items() if n != left_out}}
            if asked["mode"] == "topk":
                asked |= {"draws": None, "seed": None}
            with TargetStore.create(Path(name) / f"{number}.sqlite", **asked) as other:
                return other.key(sequence)

        with TargetStore.create(Path(name) / "store.sqlite", **made_for) as store:  # type: ignore[arg-type]
            store.put(tokens, _drawn())
            hits = [
                what
                for number, (what, changed) in enumerate(changes.items())
                if store.present([key_of(number, changed, tokens)])
            ]
            hits += ["tokens"] if store.present([store.key(_array([1, 2, 3, 5]))]) else []
            same = len(store.present([key_of(99, {}, tokens)]))
    text = f"{len(hits)} hits for {len(changes) + 1} changes{': ' + ', '.join(hits) if hits else ''}; {same} for none"
    return Finding(not hits and same == 1, text, {"hits": hits, "changes": [*changes, "tokens"], "unchanged": same})


def _drawn() -> Any:
    import numpy as np

    from latentforge.targets.row import SequenceTargets

    ids = np.array([[5, 9, 7, -1], [3, -1, -1, -1], [1, 2, 3, 4]], dtype=np.int32)
    counts = np.array([[4, 3, 1, 0], [8, 0, 0, 0], [2, 2, 2, 2]], dtype=np.float64)
    with np.errstate(divide="ignore"):
        logprobs = np.log(counts / 8).astype(np.float32)
    return SequenceTargets(ids, logprobs, {1.0: np.full(3, -np.inf, dtype=np.float32)})


def _array(tokens: list[int]) -> Any:
    import numpy as np

    return np.array(tokens, dtype=np.int64)


def _targets(seed: int) -> Any:
    import torch

    from latentforge.targets.topk import sequence_rows, topk_rows

    logits = torch.randn(5, _VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return sequence_rows(*topk_rows(logits, _K, [1.0]), sequences=1)[0]


def _value(path: Path, key: bytes) -> bytes:
    connection = sqlite3.connect(path)
    (value,) = connection.execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
    connection.close()
    return bytes(value)


def _set_value(path: Path, key: bytes, value: bytes) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous=OFF")  # hundreds of writes to a file that is thrown away
    with connection:
        connection.execute("UPDATE rows SET value = ? WHERE key = ?", (value, key))
    connection.close()
