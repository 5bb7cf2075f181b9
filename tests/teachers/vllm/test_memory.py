"""The terms of an engine of ours, held against the process tree of a real one."""

from __future__ import annotations

from pathlib import Path

from latentforge.memory import KnownModel
from latentforge.memory.engine import EngineSetting, engine_terms
from latentforge.teachers.serving.processes import members
from latentforge.teachers.serving.server import VLLMServer


def proportional(pid: int) -> int:
    """Bytes of a process, with what it shares divided by those who share it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def test_an_engines_process_tree_holds_what_its_terms_say(vllm_server: VLLMServer, served_folder: Path) -> None:
    model = KnownModel.of_folder(served_folder)
    settings = vllm_server.settings
    assert model.cache is not None
    tokens = (settings.kv_cache_bytes or 0) // model.cache.kv_bytes(1, width=4)
    terms, unknown = engine_terms(model, EngineSetting(sequences=8, kv_tokens=tokens, width=4), "cpu")
    assert not unknown
    planned = sum(term.bytes for term in terms)
    held = sum(proportional(pid) for pid in members(vllm_server.kept.session))
    assert 0.25 * planned < held <= 1.15 * planned, f"{held / 2**30:.2f} GiB held, {planned / 2**30:.2f} planned"
