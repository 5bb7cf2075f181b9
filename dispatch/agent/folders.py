"""Corpora and model folders as they lie on this host: digests, and what makes them unfit, before anything starts."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from .content import Unfit, check_same_tokens, check_text, read_vocabulary
from .paths import expand
from .protocol import AgentError

CORPUS_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
_LARGEST_HEADER = 100 << 20  # the safetensors library's own limit
_CHUNK = 1 << 20
_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


def hash_stream(file: BinaryIO, tick: Callable[[], None] | None = None) -> tuple[str, int]:
    """The sha256 and the size of what is left in `file`; `tick` is called between chunks."""
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if tick is not None:
            tick()
    return digest.hexdigest(), size


def tree_files(root: Path) -> list[str]:
    """POSIX relative paths of the regular files below `root`, sorted by their bytes; Unfit for what cannot be shipped.

    The same rule as the evidence's own: a link counts only when it leads to a regular file inside `root`.
    """
    real, found, folders = root.resolve(), [], [root]
    while folders:
        for entry in os.scandir(folders.pop()):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
                continue
            name = path.relative_to(root).as_posix()
            target = path.resolve()
            if target != real and real not in target.parents:
                raise Unfit(
                    f"{path} is a link that leads out of {root} (to {target})", f"copy it whole: cp -rL {root} …"
                )
            if not target.is_file():
                raise Unfit(f"{path} is not a regular file", f"take it out of {root}")
            if "\n" in name or name != name.encode("utf-8", "replace").decode():
                raise Unfit(f"{name!r} in {root} has a line break or bytes that are not UTF-8 in its name", "rename it")
            found.append(name)
    return sorted(found, key=str.encode)


def tree_digest(path: Path) -> tuple[str, int, int]:
    """(sha256, files, bytes): a file's own digest, or that of the sorted lines "<relative path>NUL<sha256>LF"."""
    if path.is_file():
        with open(path, "rb") as file:
            sha256, size = hash_stream(file)
        return sha256, 1, size
    whole, total = hashlib.sha256(), 0
    names = tree_files(path)
    for name in names:
        with open(path / name, "rb") as file:
            sha256, size = hash_stream(file)
        whole.update(f"{name}\0{sha256}\n".encode())
        total += size
    return whole.hexdigest(), len(names), total


def inspect(
    path: str, purpose: str, like: str | None = None, *, known: tuple[str, int, int] | None = None
) -> dict[str, Any]:
    """What a probe says about one path: ok with its digest, or the reason and the remedy.

    `like` is the folder of a model whose tokens this model must have. `known` is the digest, files and bytes of a
    folder that nobody has touched since it was read.
    """
    if purpose not in _CHECKS:
        raise AgentError("protocol", f"purpose={purpose!r} is none of: {', '.join(_CHECKS)}")
    report: dict[str, Any] = {"ok": False, "sha256": None, "files": 0, "bytes": 0, "reason": None, "next": None}
    try:
        place = expand(path, "path")
        facts = _CHECKS[purpose](place)
        if like is not None:
            check_same_tokens(expand(like, "like"), place)
        sha256, files, size = known or tree_digest(place)
        report.update(facts, ok=True, sha256=sha256, files=files, bytes=size, path=str(place))
    except Unfit as unfit:
        report.update(reason=unfit.reason, next=unfit.remedy)
    except AgentError as error:
        report.update(reason=error.message, next=error.next)
    except OSError as error:
        report.update(
            reason=f"{error.filename or path} cannot be read: {error.strerror}", next="make it readable for this user"
        )
    return report


def check_corpus(path: Path) -> dict[str, Any]:
    """Facts about a corpus (`documents_files`, `documents_bytes`); Unfit when missing, foreign, empty or not text."""
    wanted = ", ".join(CORPUS_SUFFIXES)
    if not path.exists():
        raise Unfit(
            f"corpus {path} does not exist on this host", "give a folder or file that exists there, or 'stdlib'"
        )
    if path.is_file():
        if path.suffix not in (".txt", ".jsonl"):
            raise Unfit(
                f"corpus {path} is a {path.suffix or 'nameless'} file", "give a .txt or .jsonl file, or a folder"
            )
        files = [path]
    elif path.is_dir():
        files = [path / name for name in tree_files(path) if name.endswith(CORPUS_SUFFIXES)]
        if not files:
            raise Unfit(f"corpus {path} holds no {wanted} file", "put text files into it, or give another folder")
    else:
        raise Unfit(f"corpus {path} is neither a file nor a folder", "give a folder, a .txt or a .jsonl file")
    sizes = [file.stat().st_size for file in files]
    if not sum(sizes):
        raise Unfit(
            f"corpus {path} is empty: {len(sizes)} file(s) with 0 bytes", "put text into it, or give another one"
        )
    check_text(files)
    return {"documents_files": len(sizes), "documents_bytes": sum(sizes)}


def check_model(folder: Path) -> dict[str, Any]:
    """Facts about a Hugging Face model folder (`parameters`, `vocab_size`, `tokenizer`); Unfit when it cannot load."""
    whole = "give the whole folder as save_pretrained writes it"
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist on this host"
        raise Unfit(f"model {folder} {state}", "give a folder with config.json and model.safetensors")
    config = _json_object(folder / "config.json", whole)
    for name in ("text_config", "quantization_config"):
        if not isinstance(config.get(name), (dict, type(None))):
            raise Unfit(f"{folder / 'config.json'}: {name} is {str(config[name])[:40]!r}, not a table", whole)
    weights = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if weights.is_file():
        names = [weights.name]
    elif index.is_file():
        table = _json_object(index, whole).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise Unfit(f"{index} has no weight_map", whole)
        names = sorted({str(name) for name in table.values()})
    else:
        others = sorted(path.name for path in folder.glob("*.bin"))
        if others:
            raise Unfit(f"model {folder} has only {others[0]}, a pickle", "save it again with safe_serialization=True")
        raise Unfit(f"model {folder} has no weights (model.safetensors)", whole)
    parameters = 0
    for name in names:
        if "/" in name or name in ("", ".", ".."):
            raise Unfit(f"{index} names the file {name!r}", whole)
        parameters += check_safetensors(folder / name)
    vocabulary = config.get("vocab_size")
    if vocabulary is None and isinstance(config.get("text_config"), dict):
        vocabulary = config["text_config"].get("vocab_size")
    tokenizer = (folder / "tokenizer.json").is_file()
    if tokenizer:
        read_vocabulary(folder)
    return {
        "parameters": parameters,
        "vocab_size": vocabulary if isinstance(vocabulary, int) else None,
        "model_type": config.get("model_type"),
        "tokenizer": tokenizer,
    }


def check_tokenizer(folder: Path) -> dict[str, Any]:
    """Facts about the folder of a teacher that a server answers for (`vocab_size`, `tokenizer`): no weights needed."""
    whole = "give a folder with the served model's tokenizer.json, tokenizer_config.json and config.json"
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist on this host"
        raise Unfit(f"tokenizer folder {folder} {state}", whole)
    config = _json_object(folder / "config.json", whole)
    if not (folder / "tokenizer.json").is_file():
        raise Unfit(f"tokenizer folder {folder} has no tokenizer.json", whole)
    read_vocabulary(folder)
    vocabulary = config.get("vocab_size")
    return {
        "vocab_size": vocabulary if isinstance(vocabulary, int) else None,
        "model_type": config.get("model_type"),
        "tokenizer": True,
    }


def check_targets(path: Path) -> dict[str, Any]:
    """Nothing but that a file is a store of targets which nobody is writing; Unfit where it is not."""
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist on this host"
        raise Unfit(f"store {path} {state}", "give the targets.sqlite of a score run")
    with open(path, "rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise Unfit(f"store {path} is no SQLite file", "give the targets.sqlite of a score run")
    journal = path.with_name(path.name + "-wal")
    if journal.exists() and journal.stat().st_size:
        raise Unfit(f"store {path} is being written: {journal.name} is not empty", "wait for the run that writes it")
    return {}


def check_safetensors(path: Path) -> int:
    """The number of elements in a safetensors file; Unfit when its header is corrupt or belies its size."""
    again = f"copy {path.name} again, whole"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise Unfit(f"{path} has {size} bytes: not even the length of a safetensors header", again)
            (length,) = struct.unpack("<Q", prefix)
            if length > min(_LARGEST_HEADER, size - 8):
                raise Unfit(f"{path} has {size} bytes, its header alone claims {length}", again)
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise Unfit(f"{path} is missing", again) from None
    except ValueError as error:
        raise Unfit(f"{path} has a corrupt safetensors header: {error}", again) from None
    if not isinstance(header, dict):
        raise Unfit(f"{path} has a safetensors header that is not an object", again)
    spans: list[tuple[int, int]] = []
    elements = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        begin, end, count = _span(path, name, tensor, again)
        spans.append((begin, end))
        elements += count
    if not spans:
        raise Unfit(f"{path} holds no tensor", again)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise Unfit(f"{path} has a hole or an overlap at byte {begin} of its data", again)
        position = end
    if 8 + length + position != size:
        verb = "is truncated" if size < 8 + length + position else "has bytes too many"
        raise Unfit(f"{path} {verb}: {size} bytes, its header describes {8 + length + position}", again)
    return elements


def _span(path: Path, name: str, tensor: Any, again: str) -> tuple[int, int, int]:
    bad = Unfit(f"{path} has a corrupt safetensors header at tensor {name!r}", again)
    if not isinstance(tensor, dict):
        raise bad
    offsets, shape, dtype = tensor.get("data_offsets"), tensor.get("shape"), tensor.get("dtype")
    if not (isinstance(offsets, list) and len(offsets) == 2 and isinstance(shape, list)):
        raise bad
    if not all(isinstance(number, int) and number >= 0 for number in [*offsets, *shape]):
        raise bad
    count = 1
    for extent in shape:
        count *= extent
    if isinstance(dtype, str) and dtype in _SIZES and offsets[1] - offsets[0] != count * _SIZES[dtype]:
        raise bad
    if offsets[1] < offsets[0]:
        raise bad
    return offsets[0], offsets[1], count


def _json_object(path: Path, remedy: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Unfit(f"{path} is missing", remedy) from None
    except ValueError as error:
        raise Unfit(f"{path} is not JSON: {error}", remedy) from None
    if not isinstance(document, dict):
        raise Unfit(f"{path} is not a JSON object", remedy)
    return document


_CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "corpus": check_corpus,
    "model": check_model,
    "tokenizer": check_tokenizer,
    "targets": check_targets,
}
