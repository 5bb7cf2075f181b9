"""The ``latentforge`` command: groups that are imported only when one of them is used.

Listing the groups must not import them (``latentforge --help`` starts in under a quarter of a second on a slow
laptop), so their one-line descriptions stand here and the modules are loaded by name. A group's module
``latentforge.cli.<name>`` exports ``app``, a ``typer.Typer``; its functions import what is heavy inside themselves.
A command's function returns an ExitCode (or None for 0), or raises a LatentForgeError.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from latentforge.errors import LatentForgeError
from latentforge.verdicts.exitcode import ExitCode


class Entry(NamedTuple):
    """Where a command lives and what ``--help`` says of it; ``single`` for a command without subcommands."""

    module: str
    help: str
    single: bool = False


ENTRIES = {
    "dispatch": Entry("latentforge.cli.dispatch", "Plan, launch, follow and collect runs on hosts."),
    "spec": Entry("latentforge.cli.spec", "Show a pipeline's values and where each comes from."),
    "memory": Entry("latentforge.cli.memory", "Show what a pipeline will hold on a host, term by term.", single=True),
    "contracts": Entry("latentforge.cli.contracts", "List, show and check the claims that this project makes."),
    "evidence": Entry("latentforge.cli.evidence", "Verify, offline, what a run left behind; sign, compare, reproduce."),
    "report": Entry("latentforge.cli.report", "Show what runs did, as one page that needs nothing else.", single=True),
    "runs": Entry("latentforge.cli.runs", "List, show and compare runs, of this folder, its ledger and hosts."),
    "promote": Entry("latentforge.cli.promote", "Publish a student whose evidence and claims hold.", single=True),
    "teacher": Entry("latentforge.cli.teacher", "Serve a teacher on this machine, and ask what one can do."),
    "generate": Entry("latentforge.cli.generate", "Write text with a student that was trained here.", single=True),
    "bench": Entry("latentforge.cli.bench", "Measure teachers and students side by side."),
    "serve": Entry("latentforge.cli.serve", "Serve a student over HTTP, as OpenAI's completions.", single=True),
    "kernels": Entry("latentforge.cli.kernels", "Measure the kernels on this machine."),
    "targets": Entry("latentforge.cli.targets", "Look into a store of teacher targets, check it, keep it in bounds."),
    "capabilities": Entry(
        "latentforge.cli.capabilities", "Print what this install can be asked for, as JSON.", single=True
    ),
    "run": Entry("latentforge.cli.run", "Execute one run directory in this process.", single=True),
}

_CLOSED_PIPE = 141  # what a shell reports of a command that SIGPIPE ended

# Which extra brings a module, for the message that an operator's install prints.
_EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "tokenizers": "train",
    "safetensors": "train",
    "numpy": "train",
    "zstandard": "train",
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
}


class LazyGroup(TyperGroup):
    """A group whose subcommands are imported when they are invoked, not when they are listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all entries, in the order in which they are declared."""
        return list(ENTRIES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command behind a name, its module imported now; None where there is none."""
        entry = ENTRIES.get(cmd_name)
        if entry is None:
            return None
        if cmd_name not in self.commands:
            app: typer.Typer = importlib.import_module(entry.module).app
            # One look for every group: plain text, and no import of rich for a page of help.
            app.rich_markup_mode = None
            build = typer.main.get_command if entry.single else typer.main.get_group
            self.commands[cmd_name] = build(app)
            self.commands[cmd_name].name = cmd_name
        return self.commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the list of entries from their declared one-line descriptions."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in ENTRIES.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Finds the subcommand; an unknown one is refused with the nearest that exists."""
        name = args[0]
        if name not in ENTRIES and not name.startswith("-"):
            near = get_close_matches(name, ENTRIES, n=1)
            suggestion = f"latentforge {near[0]} --help" if near else "latentforge --help"
            raise LatentForgeError(f"there is no command {name!r}", next=suggestion)
        return super().resolve_command(ctx, args)


def _version(asked: bool) -> None:
    if asked:
        from latentforge import __version__

        typer.echo(f"latentforge {__version__}")
        raise typer.Exit()


app = typer.Typer(cls=LazyGroup, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def _help(context: typer.Context, asked: bool) -> None:
    if asked:
        typer.echo(context.get_help())
        raise typer.Exit()


# The help option is our own: the generated one, where it is not given, makes typer import pydantic (0.1 s).
@app.callback(invoke_without_command=True, add_help_option=False)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where an error is reported.")] = False,
    show_help: Annotated[
        bool, typer.Option("--help", callback=_help, is_eager=True, help="Show this message and end.")
    ] = False,
) -> None:
    """Distil a large language-model teacher into a fast student on machines that you own."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _report(what: str, following: str | None) -> None:
    # What an error names may be a run's own text, or a file's name: neither steers the terminal.
    what = "".join(one if one.isprintable() or one == "\n" else f"⟨U+{ord(one):04X}⟩" for one in what)
    lines = [f"error: {what}"]
    if following:
        first, *rest = following.splitlines()
        lines += [f"  next: {first}", *(f"        {line}" for line in rest)]
    # Whoever reads may have gone, or never been there (2>&1 | head -1, >&-): the exit code says it all the same.
    with suppress(BrokenPipeError):
        if sys.stdout is not None:
            sys.stdout.flush()
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Removes ``--debug`` wherever it stands before ``--``, so that it can be added to the end of a typed command."""
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return kept + arguments[end:], len(kept) != end


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code of DESIGN.md (usage 2, unexpected errors 5, Ctrl-C 130)."""
    rest, debug = _take_debug(sys.argv[1:] if arguments is None else arguments)
    debug = debug or os.environ.get("LATENTFORGE_DEBUG") == "1"
    command = typer.main.get_command(app)
    try:
        result = command.main(rest, prog_name="latentforge", standalone_mode=False)
        if result is None:
            return ExitCode.PASS
        if not isinstance(result, int):
            raise TypeError(f"the command returned {result!r}, not an exit code")
        return int(result)
    except typer.TyperException as error:
        if debug:
            raise
        return _usage_error(error)
    except SystemExit as ended:
        # typer ends with 1 where the reader of a pipe went away; 1 would read as a falsifier's verdict.
        closed = type(sys.stdout).__name__ == "PacifyFlushWrapper"
        return _CLOSED_PIPE if closed else ended.code if isinstance(ended.code, int) else ExitCode.CRASHED
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return ExitCode.DETACHED
    except Exception as error:
        if debug:
            raise
        told = explained(error)
        _report(str(told), told.next)
        return int(told.code)


def explained(error: Exception) -> LatentForgeError:
    """Any error as one that a user can act on: what to install where a module is missing, else where to look."""
    where = "the same command with --debug shows where"
    if isinstance(error, LatentForgeError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name is not None:  # transformers raises some without a name
        missing = error.name.partition(".")[0]
        if missing in ("latentforge", "dispatch"):
            return LatentForgeError(f"this install lacks {error.name}", next=where, code=ExitCode.CRASHED)
        extra = _EXTRAS.get(missing)
        # From a checkout: no package index is known to hold this project under its name.
        following = f"in a checkout:  pip install '.[{extra}]'" if extra else where
        return LatentForgeError(f"this command needs the module {error.name}, which is not installed", next=following)
    # Not 1: that would read as a falsifier's verdict.
    return LatentForgeError(f"unexpected {type(error).__name__}: {error}", next=where, code=ExitCode.CRASHED)


def _usage_error(error: Any) -> int:
    """Shows a usage error of the argument parser in the project's form; a group called bare shows its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return ExitCode.REFUSED
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "latentforge"
    _report(error.format_message(), f"{path} --help")
    return int(error.exit_code)


__all__ = ["ENTRIES", "Entry", "LazyGroup", "app", "explained", "main"]
