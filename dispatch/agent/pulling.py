"""Pulled models as they lie on this host: complete, or not; looked at without being read or changed."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from .durable import read_json
from .paths import NAME, Root, RunPaths
from .protocol import AgentError

MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}@[0-9a-f]{40}")


def check_model_name(name: object) -> str:
    """`name` itself when it is that of a pinned model's folder; refused otherwise."""
    if not isinstance(name, str) or not MODEL.fullmatch(name):
        raise AgentError("refused", f"model={name!r} is not <repository>@<40 hex digits>")
    return name


def files_of(root: Root, name: str) -> Path:
    """The folder of a pulled model's files, which is there once they all were right."""
    return root.models / check_model_name(name) / "files"


def look(root: Root, name: str) -> dict[str, Any]:
    """Whether the model is complete, and if not why; nothing of it is read but sizes and stamps.

    A file that was touched since it was verified makes it incomplete, whatever its bytes are: the next pull reads it.
    """
    place = root.models / check_model_name(name)
    report: dict[str, Any] = {"complete": False, "why": None, "sha256": None, "files": 0, "bytes": 0, "bad": []}
    report |= {"path": str(place / "files"), "present": present(place)}
    marker = read_json(place / ".complete.json")
    if marker is None:
        report["why"] = "it is not there" if not place.is_dir() else "its pull did not come to its end"
        return report
    try:
        listed = {one["path"]: one["stamp"] for one in marker["files"]}
        report |= {"sha256": str(marker["sha256"]), "files": len(listed)}
        report["bytes"] = sum(int(one["bytes"]) for one in marker["files"])
    except (KeyError, TypeError, ValueError):
        report["why"] = "its .complete.json cannot be read"
        return report
    bad = sorted(path for path, stamp in listed.items() if _stamp(place / "files" / path) != stamp)
    strangers = sorted(set(_names(place / "files")) - set(listed))
    if bad:
        report["why"] = f"{bad[0]} was changed since it was verified, or is gone" + _more(bad)
    elif strangers:
        report["why"] = f"{strangers[0]} is not part of it" + _more(strangers)
    report |= {"complete": not bad and not strangers, "bad": bad[:100]}
    return report


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def present(place: Path) -> dict[str, int]:
    """Files that a pull which did not come to its end has left, with their sizes."""
    found = {}
    for folder in ("files", "tree"):
        for name in _names(place / folder):
            try:
                found[name] = os.lstat(place / folder / name).st_size
            except OSError:
                continue
    return found


def check_inputs(root: Root, runs: list[RunPaths]) -> None:
    """Refuse to start runs whose model, build, environment, objects or input runs are not (or no longer) there, whole.

    Between a plan and its launch somebody else may have cleaned up, or touched a model.
    """
    starting = {run.id for run in runs}
    for run in runs:
        launch = read_json(run.launch) or {}
        for ref in (launch.get("resolved") or {}).values():
            if not isinstance(ref, dict):
                continue
            if isinstance(path := ref.get("path"), str) and (name := _model_of(root, path)) is not None:
                found = look(root, name)
                if not found["complete"]:
                    raise AgentError(
                        "incomplete",
                        f"{run.id} takes the model {name}, which is not complete: {found['why']}",
                        next=f"latentforge dispatch pull {name.replace('--', '/')}",
                    )
            other = ref.get("run")
            if isinstance(other, str) and other not in starting and not root.run(other).identity.is_file():
                raise _gone(run, f"its input {other}")
        words = json.dumps([launch.get("argv"), launch.get("env")], ensure_ascii=False)
        for folder, pattern in ((root.builds, NAME.pattern), (root.venvs, NAME.pattern)):
            for made in set(re.findall(re.escape(f"{folder}/") + f"({pattern})/", words)):
                if not run.id.startswith("build-") and not (folder / made / ".complete.json").is_file():
                    raise _gone(run, str(folder / made))
        for sha256 in set(re.findall(re.escape(f"{root.cas}/") + "([0-9a-f]{64})", words)):
            if not root.object(sha256).is_file():
                raise _gone(run, str(root.object(sha256)))


def _gone(run: RunPaths, what: str) -> AgentError:
    return AgentError(
        "gone", f"{run.id} needs {what}, which is not on this host any more", next="the same command again"
    )


def _model_of(root: Root, path: str) -> str | None:
    """The pulled model that a path leads into; None where it is a folder of the user's."""
    parts = Path(os.path.normpath(path)).parts
    inside = root.models.parts
    if parts[: len(inside)] != inside or len(parts) <= len(inside) or not MODEL.fullmatch(parts[len(inside)]):
        return None
    return parts[len(inside)]


def _stamp(path: Path) -> list[int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _names(tree: Path) -> list[str]:
    found = []
    for parent, folders, names in os.walk(tree):
        for name in [*names, *(one for one in folders if os.path.islink(os.path.join(parent, one)))]:
            # A stranger may have a name that is no text: told, it must not break the answer.
            found.append(Path(parent, name).relative_to(tree).as_posix().encode("utf-8", "backslashreplace").decode())
    return found
