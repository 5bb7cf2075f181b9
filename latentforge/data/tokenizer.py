"""Byte-level BPE through ``tokenizers``: trained on a corpus, or taken unchanged from a teacher's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from latentforge.data.encoding import Encoded, WordEncoder, encode_all, why_not
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256

EOS = "<|endoftext|>"
BPE_SAMPLE_BYTES_A_TOKEN = 1000
BPE_SAMPLE_BOUNDS = (256_000, 256_000_000)
"""Merges are learnt from so much text for each token of the vocabulary, within bounds: more hardly changes them."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as data sees it: text in, ids out; no truncation, no padding, no template, no special token parsed.

    ``vocab_size`` is the largest id + 1, ``eos_id`` the id that ends each document, ``sha256`` that of tokenizer.json.
    """

    folder: Path
    backend: tokenizers.Tokenizer
    vocab_size: int
    eos_id: int
    sha256: str

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a folder in Hugging Face's layout; it needs a tokenizer.json and a known eos_token."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise RefusedError(
                f"{folder} has no tokenizer.json",
                next=f"make one:  AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})",
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise RefusedError(f"{file} cannot be read: {error}") from None
        # Left over from how others used the folder; either would silently shorten or fill documents.
        backend.no_truncation()
        backend.no_padding()
        # A document that quotes "<|endoftext|>" must not end there.
        backend.encode_special_tokens = True
        if dropout := getattr(backend.model, "dropout", None):
            raise RefusedError(
                f"{file} drops merges at random (dropout = {dropout:g}): the same text would get other ids each time",
                next='set "dropout": null in its model',
            )
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise RefusedError(f"{file} has an empty vocabulary")
        return cls(folder, backend, max(vocabulary.values()) + 1, _eos_id(folder, vocabulary), file_sha256(file))

    def encode(
        self, texts: Iterable[str], *, bos_id: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
        """(UTF-8 bytes, ids ending in EOS as uint32) of each text in order; works in batches, lazily.

        Each document begins with ``bos_id`` where one is given; nothing is added otherwise.
        """
        first = np.array([] if bos_id is None else [bos_id], dtype=np.uint32)
        last = np.array([self.eos_id], dtype=np.uint32)
        for size, ids in self._encoder(texts):
            yield size, np.concatenate([first, ids, last])

    @cached_property
    def _encoder(self) -> Callable[[Iterable[str]], Iterator[Encoded]]:
        return WordEncoder(self.backend) if why_not(self.backend) is None else partial(encode_all, self.backend)


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Learn a byte-level BPE of ``vocab_size`` tokens (id 0 is EOS) and save it so that AutoTokenizer loads it.

    The same texts in the same order give the same bytes. RefusedError where the texts yield too few tokens.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    low, high = BPE_SAMPLE_BOUNDS
    sample = min(max(low, vocab_size * BPE_SAMPLE_BYTES_A_TOKEN), high)
    backend.train_from_iterator(_sample(texts, sample), trainer)
    learnt = backend.get_vocab_size()
    if learnt != vocab_size:
        raise RefusedError(
            f"vocab_size = {vocab_size}: the corpus yields only {learnt} tokens",
            next=f"set data.vocab_size = {learnt} or less, or give a larger corpus",
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    # Written by hand rather than by transformers: the same bytes under every version of it, and no 3 s import.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", {"eos_token": EOS})
    return Tokenizer.open(folder)


def copy_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """Copy a folder's tokenizer files unchanged; RefusedError where it has none that can be used."""
    Tokenizer.open(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for name in ("config.json", "generation_config.json"):
        # Only where the end-of-text token is said nowhere else does the model's own configuration travel along, and
        # never over that of a model which is in the folder already.
        if _eos_text(folder) is None and (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
    return Tokenizer.open(folder)


def vocabulary(folder: Path) -> dict[int, str]:
    """Token text by id of a folder's tokenizer, added tokens included."""
    return {number: text for text, number in Tokenizer.open(folder).backend.get_vocab(with_added_tokens=True).items()}


def _eos_id(folder: Path, vocabulary: dict[str, int]) -> int:
    text = _eos_text(folder)
    if text is not None:
        if text not in vocabulary:
            raise RefusedError(f"{folder}: eos_token {text!r} is not in its tokenizer.json")
        return vocabulary[text]
    for name in ("generation_config.json", "config.json"):
        number = read_json(folder / name).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and not isinstance(number, bool):
            if number not in vocabulary.values():
                raise RefusedError(f"{folder / name}: eos_token_id {number} is not an id of its tokenizer.json")
            return number
    raise RefusedError(
        f"{folder} names no eos_token (tokenizer_config.json, special_tokens_map.json, config.json)",
        next='add "eos_token" to tokenizer_config.json',
    )


def _eos_text(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_json(folder / name).get("eos_token")
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            return text
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, empty where there is no such file; RefusedError where it is something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise RefusedError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RefusedError(f"{path} is not a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts up to ``limit`` bytes in all; the last one is cut."""
    left = limit
    for text in texts:
        content = text.encode()
        if len(content) > left:
            yield content[:left].decode("utf-8", "ignore")
            return
        yield text
        left -= len(content)
        if not left:
            return
