"""What a vLLM is started with, and what counts as memory that came back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from latentforge.teachers.serving.memory import GIB, wait_for_return
from latentforge.teachers.serving.settings import (
    ServingSettings,
    find_environment,
    fitted,
    pinned_kv_bytes,
    server_environment,
)


def _value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_a_server_is_bounded_as_a_machine_with_one_pool_of_memory_needs_it(settings: ServingSettings) -> None:
    command = replace(settings, kv_cache_bytes=6 << 30).server_command(8123)
    assert _value(command, "--host") == "127.0.0.1"
    assert _value(command, "--gpu-memory-utilization") == "0.8"
    assert _value(command, "--kv-cache-memory-bytes") == str(6 << 30)
    assert _value(command, "--max-model-len") == "16384"
    assert _value(command, "--max-logprobs") == "256"
    assert "--enforce-eager" in command
    assert "--disable-uvicorn-access-log" in command
    assert "--enforce-eager" not in replace(settings, eager=False).server_command(8123)


def test_a_server_reports_nothing_fetches_nothing_and_is_given_no_key() -> None:
    found = server_environment({"PATH": "/bin", "VENICE_API_KEY": "a", "VLLM_API_KEY": "b", "HF_TOKEN": "c"})
    assert found["PATH"] == "/bin"
    assert found["VLLM_NO_USAGE_STATS"] == found["DO_NOT_TRACK"] == found["HF_HUB_OFFLINE"] == "1"
    assert not {"VENICE_API_KEY", "VLLM_API_KEY", "HF_TOKEN"} & found.keys()


def test_a_length_beyond_the_models_positions_gives_way_and_says_so(settings: ServingSettings) -> None:
    fit, _, notes = fitted(settings)
    assert fit.max_model_len == 64
    assert notes[0] == "the model has 64 positions: max-model-len is 64, not 16384"
    assert fitted(replace(settings, max_model_len=32))[0].max_model_len == 32
    assert not any("positions" in note for note in fitted(replace(settings, max_model_len=32))[2])


def test_the_kv_cache_is_pinned_to_what_scoring_needs_unless_it_is_told(settings: ServingSettings) -> None:
    fit, _, notes = fitted(settings)
    assert fit.kv_cache_bytes == 256 << 20
    assert "KV cache pinned to 0.25 GiB" in notes[1]
    assert fitted(replace(settings, kv_cache_bytes=7))[0].kv_cache_bytes == 7
    told = fitted(replace(settings, kv_cache_bytes=0))[0]
    assert "--kv-cache-memory-bytes" not in told.server_command(8123)

    # 24 KiB a token: 12 of 48 layers with attention, 2 heads of 256, bf16.
    config = {"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256}
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * 12
    tokens = 16384 + 32768
    assert pinned_kv_bytes({**config, "layer_types": kinds}, settings) == 24 * 1024 * tokens
    assert pinned_kv_bytes(config, replace(settings, dtype="float32")) == 8 * 24 * 1024 * tokens
    assert pinned_kv_bytes({}, settings) is None


def test_an_environment_that_was_named_comes_before_the_variable(tmp_path: Path) -> None:
    assert find_environment(tmp_path, {"LATENTFORGE_VLLM_ENVIRONMENT": "/other"}) == tmp_path
    assert find_environment(None, {"LATENTFORGE_VLLM_ENVIRONMENT": "/other"}) == Path("/other")


def test_memory_is_waited_for_until_it_is_back_and_missed_where_it_is_not() -> None:
    readings = iter([10, 40, 95])
    found = wait_for_return(100, allowed=5, read=lambda: next(readings), pause=lambda seconds: None)
    assert found.returned
    assert found.after == 95

    ticks = iter(range(1000))
    held = int(30 * GIB)
    kept = wait_for_return(
        int(100 * GIB),
        allowed=int(4 * GIB),
        seconds=240.0,
        read=lambda: int(100 * GIB) - held,
        clock=lambda: float(next(ticks)),
        pause=lambda seconds: None,
    )
    assert not kept.returned
    assert kept.seconds >= 240.0
    assert "NOT back" in str(kept)
    assert "30.0 GiB are held" in str(kept)
