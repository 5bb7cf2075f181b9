"""A folder as a model that writes: its weights, its codec and its tokenizer, each checked before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from latentforge.data.special import special_tokens
from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256
from latentforge.students.latent.codec import DESCRIPTION as CODEC
from latentforge.students.latent.folder import WEIGHTS
from latentforge.students.latent.scoring import Scorer
from latentforge.students.latent.session import LatentModel
from latentforge.students.latent.student import DESCRIPTION as STUDENT
from latentforge.students.token_session import TokenModel
from latentforge.teachers.folder import check_model_folder

CODEC_FOLDER = "codec"
_CONFIG = "config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_GET_ONE = "name the folder of a latent or distill run, or its out/student"


@dataclass(frozen=True)
class Writer:
    """A model with its tokenizer, ready to write.

    ``before`` are the ids that begin each text, as in training: the BOS that the tokenizer puts there, if any.
    ``digests`` are sha256 (hex) by name: ``student`` and ``codec`` of their weights' files (of a token-level student,
    which has no codec, of all of its tensors), ``tokenizer`` of tokenizer.json. ``parameters`` counts the numbers of
    student and codec.
    """

    model: Scorer
    tokenizer: Tokenizer
    kind: Literal["latent", "token"]
    digests: dict[str, str]
    parameters: int
    folder: Path
    before: tuple[int, ...] = ()

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The ids of a prompt, as a document that begins so has them; no special token is parsed in it."""
        found: list[int] = self.tokenizer.backend.encode_batch_fast([prompt], add_special_tokens=False)[0].ids
        return (*self.before, *found)


def open_writer(path: Path, *, device: str = "cpu", cache: bool = True, kernel_backend: str = "auto") -> Writer:
    """The writer of ``path``: a run's folder, its ``out``, its ``out/student``, or a copy of the last anywhere.

    ``device`` is a torch device, or ``auto``: the GPU where there is one. RefusedError names the path where there is no
    student, where weights are a pickle or not those that were recorded, and where student, codec and tokenizer do not
    belong together.
    """
    place = _device(device)
    folder = _find(Path(path).expanduser())
    _check_inventory(folder)
    if (folder / STUDENT).is_file():
        return _latent(folder, place, cache, kernel_backend)
    return _token(folder, place, cache, kernel_backend)


def _latent(folder: Path, device: torch.device, cache: bool, kernel_backend: str) -> Writer:
    codec = folder / CODEC_FOLDER
    for part, description in ((folder, STUDENT), (codec, CODEC)):
        if not (part / description).is_file():
            raise RefusedError(
                f"{part} holds no {description}: a latent student cannot write without its codec",
                next=f"copy it from the autoencoder run:  cp -r RUN/out/codec {codec}",
            )
        if not (part / WEIGHTS).is_file():
            raise _no_weights(part)
    tokenizer = Tokenizer.open(folder)
    model = LatentModel.open(
        folder, codec, tokenizer_sha256=tokenizer.sha256, device=device, cache=cache, kernel_backend=kernel_backend
    )
    student, coder = model.student.record, model.codec.record
    assert student is not None  # opened, so they have one
    assert coder is not None
    if student.eos_id != tokenizer.eos_id or coder.eos_id != tokenizer.eos_id:
        raise RefusedError(
            f"{folder}: texts end with id {student.eos_id} of the student, {coder.eos_id} of the codec and "
            f"{tokenizer.eos_id} of the tokenizer",
            next="copy the tokenizer's files from the data run, all of them",
        )
    if model.vocab_size < tokenizer.vocab_size:
        raise RefusedError(f"{folder}: {tokenizer.vocab_size} tokens, and a student of {model.vocab_size}")
    digests = {"student": student.digest, "codec": coder.digest, "tokenizer": tokenizer.sha256}
    return Writer(
        model, tokenizer, "latent", digests, _numbers(model.student) + _numbers(model.codec), folder, _before(tokenizer)
    )


def _token(folder: Path, device: torch.device, cache: bool, kernel_backend: str) -> Writer:
    if _pickles(folder) and not list(folder.glob("*.safetensors")):
        raise _no_weights(folder)
    found = check_model_folder(folder)
    tokenizer = Tokenizer.open(folder)
    model = TokenModel.open(
        folder,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        device=str(device),
        cache=cache,
        kernel_backend=kernel_backend,
    )
    digests = {"student": found.weights_sha256, "tokenizer": tokenizer.sha256}
    return Writer(model, tokenizer, "token", digests, _numbers(model.student), folder, _before(tokenizer))


def _before(tokenizer: Tokenizer) -> tuple[int, ...]:
    # The end of the text before, which begins a text for some tokenizers, is what a model starts from anyway.
    return tuple(one for one in special_tokens(tokenizer.folder, tokenizer).before if one != tokenizer.eos_id)


def _numbers(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise RefusedError(f"device = {name!r} is no device", next="take cpu, cuda or auto") from None
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise RefusedError(f"device = {name!r}: this machine, or this torch, has none", next="take cpu or auto")
    return found


def _find(path: Path) -> Path:
    """The folder of the student that ``path`` means."""
    if not path.exists():
        raise RefusedError(f"{path} does not exist", next=_GET_ONE)
    if not path.is_dir():
        what = "a pickle, which is never read" if _is_pickle(path) else "a file"
        raise RefusedError(f"{path} is {what}, not a student's folder", next=_GET_ONE)
    below = (path, path / "student", path / "out" / "student")
    for folder in below:
        if any((folder / name).is_file() for name in (STUDENT, _CONFIG)):
            return folder
    for folder in below:
        if any((one / CODEC).is_file() for one in (folder, folder / CODEC_FOLDER, folder.parent / CODEC_FOLDER)):
            raise RefusedError(f"{path} holds a codec and no student", next=_GET_ONE)
        if _pickles(folder):
            raise _no_weights(folder)
    raise RefusedError(f"{path} holds no student: no {STUDENT} and no {_CONFIG}", next=_GET_ONE)


def _pickles(folder: Path) -> list[Path]:
    return sorted(file for pattern in _PICKLES for file in folder.glob(pattern))


def _is_pickle(file: Path) -> bool:
    return any(file.match(pattern) for pattern in _PICKLES)


def _no_weights(folder: Path) -> RefusedError:
    found = _pickles(folder)
    have = f"; it has {found[0].name}, a pickle, which is never read" if found else ""
    return RefusedError(f"{folder} holds no {WEIGHTS}{have}", next="copy the whole folder from its run again")


def _check_inventory(folder: Path) -> None:
    """Refuse a student in a run's folder whose files are not those that the run's ``artifacts.json`` lists."""
    run = folder.parent.parent
    inventory = run / "artifacts.json"
    if (folder.parent.name, folder.name) != ("out", "student") or not inventory.is_file():
        return
    try:
        listed: list[dict[str, str]] = json.loads(inventory.read_bytes())["files"]
        wanted = {one["path"]: one["sha256"] for one in listed}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{inventory} cannot be read: {error!r}", next="collect the run again") from None
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(run).as_posix()
        if name in wanted and (found := file_sha256(file)) != wanted[name]:
            raise RefusedError(
                f"{file} is sha256 {found[:12]}…, {inventory.name} of its run says {wanted[name][:12]}…",
                next="collect the run again",
            )
