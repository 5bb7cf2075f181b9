"""Pipeline files: those that come with the package, by name, and a user's own, by path."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError

NEEDS = "needs"
"""The one key of a pipeline file that is not of the spec: the fields that whoever launches it has to give."""


@dataclass(frozen=True)
class RecipeFile:
    """A pipeline file as it is written: what was ``asked`` for, its ``name``, its values and what it ``needs``."""

    asked: str
    name: str
    document: dict[str, Any]
    needs: tuple[str, ...]


def recipe_names() -> list[str]:
    """The pipelines that come with the package."""
    folder = resources.files("latentforge") / "recipes"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def read_recipe(recipe: str) -> RecipeFile:
    """Read a recipe by name or a pipeline file by path; RefusedError where it is neither, or no TOML."""
    path = Path(recipe)
    if path.suffix == ".toml" or "/" in recipe:
        text, name = _read_file(path), path.name
    elif recipe in recipe_names():
        text, name = (resources.files("latentforge") / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8"), recipe
    else:
        close = difflib.get_close_matches(recipe, recipe_names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "name a .toml file, or one of: " + ", ".join(recipe_names())
        raise RefusedError(f"no recipe is called {recipe!r}", next=hint)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RefusedError(f"{name} is not TOML: {error}") from error
    needs = document.pop(NEEDS, [])
    if not isinstance(needs, list) or not all(isinstance(field, str) for field in needs):
        raise RefusedError(f"{NEEDS} = {needs!r} is not a list of fields ({name})", next='needs = ["teacher.model"]')
    return RecipeFile(recipe, name, document, tuple(needs))


def _read_file(path: Path) -> str:
    hint = "name a .toml file, or one of: " + ", ".join(recipe_names())
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise RefusedError(f"pipeline file {str(path)!r} {what}", next=hint)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise RefusedError(
            f"pipeline file {str(path)!r} is not UTF-8: byte 0x{byte:02x} at offset {error.start}",
            next="convert it:  iconv -f <its encoding> -t UTF-8",
        ) from None
    except OSError as error:
        raise RefusedError(f"pipeline file {str(path)!r} cannot be read: {error.strerror}", next=hint) from None
