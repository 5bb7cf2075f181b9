"""Who answers where a vLLM of our own computes: the model's files are at hand, unlike those of somebody's server."""

from __future__ import annotations

from latentforge.data.tokenizer import Tokenizer
from latentforge.teachers.folder import ModelFolder
from latentforge.teachers.protocol import TeacherIdentity


def content_identity(folder: ModelFolder, tokenizer: Tokenizer, dtype: str) -> TeacherIdentity:
    """Who answers where the files are at hand: their content, and that vLLM computes with them in ``dtype``."""
    method = folder.quantization
    numbers = f"vllm/{dtype}" if method is None else f"{method}/vllm/{dtype}"
    return TeacherIdentity(folder.architecture, folder.sha256, numbers, tokenizer.sha256)
