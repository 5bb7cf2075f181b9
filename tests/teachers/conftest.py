"""Tiny models and data, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentforge.data import ShardSet, build_shards
from latentforge.data.tokenizer import copy_tokenizer

ModelMaker = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """40 training and 6 held-out rows of 16 tokens, vocabulary 270."""
    corpus = tmp_path_factory.mktemp("corpus")
    generator = np.random.Generator(np.random.PCG64(5))
    for number in range(120):
        words = generator.choice(["the", "other", "return", "def", "import", "x=1"], size=20)
        (corpus / f"{number}.txt").write_text(f"{number} " + " ".join(words))
    return build_shards(
        corpus,
        tmp_path_factory.mktemp("data"),
        vocab_size=270,
        sequence_length=16,
        train_sequences=40,
        heldout_sequences=6,
    )


@pytest.fixture(scope="session")
def make_model(shards: ShardSet) -> ModelMaker:
    """``make_model(folder, seed=1, rows=270, **saving)`` saves a tiny Qwen3 with the data's tokenizer; returns it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def make(folder: Path, *, seed: int = 1, rows: int = 270, positions: int = 64, **saving: Any) -> Any:
        config = Qwen3Config(
            vocab_size=rows,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=48,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            initializer_range=0.4,
            eos_token_id=0,
            bos_token_id=None,
        )
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).eval()
        model.save_pretrained(folder, **saving)
        copy_tokenizer(shards.tokenizer_dir, folder)
        return model

    return make


@pytest.fixture(scope="session")
def teacher_folder(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher; copy it before changing it."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    make_model(folder)
    return folder
