"""The same held-out beginnings, continued by every model of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from latentforge.data.shards import ShardSet
from latentforge.students.causal import Student

PROMPTS = 4
NEW_TOKENS = 24


def samples(models: dict[str, Student], data: ShardSet, device: torch.device) -> list[dict[str, Any]]:
    """For a few held-out rows: the first half of what fits as ``prompt``, the text that followed, and each model's
    most likely continuation."""
    new = min(NEW_TOKENS, data.sequence_length // 2)
    given = min(data.sequence_length - new, 2 * new)
    rows = data.heldout.rows(np.arange(min(PROMPTS, len(data.heldout))))
    prompts = torch.from_numpy(rows[:, :given]).to(device)
    backend = data.tokenizer().backend

    def decode(ids: Any) -> str:
        return str(backend.decode(ids.tolist(), skip_special_tokens=False))

    continued = {name: model.eval().continue_greedily(prompts, new).cpu().numpy() for name, model in models.items()}
    return [
        {
            "prompt": decode(row[:given]),
            "text": decode(row[given : given + new]),
            **{name: decode(ids[number][given:]) for name, ids in continued.items()},
        }
        for number, row in enumerate(rows)
    ]
