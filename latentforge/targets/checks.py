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
