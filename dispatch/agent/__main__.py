"""One process, one request: read it, run the verb, answer in a frame."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cas import Origin
    from .paths import Root
    from .protocol import AgentError, Arguments, Payload, Reply


def main(pyz: bytes | None = None, verb: str | None = None) -> None:
    """Serve the request on stdin, or supervise when called so; `pyz` is the zip when it was carried in over stdin.

    `verb` is what the request will be about, where that is known: it may still be on its way.
    """
    # This file is kept readable to old interpreters, so that they get an answer instead of a syntax error.
    if sys.version_info < (3, 10):  # noqa: UP036
        _answer_old_python()
        return
    sys.dont_write_bytecode = True
    os.umask(0o077)
    from .processes import AGENT, call_myself

    call_myself(AGENT)
    if sys.argv[1:2] == ["supervise"]:
        from .supervisor import supervise

        supervise()
        return
    if sys.argv[1:2] in (["unit"], ["finalize"]):
        from .unit import finalize, serve_unit

        (serve_unit if sys.argv[1] == "unit" else finalize)(sys.argv[0], sys.argv[2])
        return
    # Whatever a library prints must not get into the frame.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from .cas import Origin

    if verb == "probe":
        with contextlib.suppress(Exception):  # the verb itself says what is amiss
            from . import probe  # noqa: F401
    try:
        with out:
            for part in answers(sys.stdin.buffer, Origin(pyz, None if pyz else sys.argv[0])):
                out.write(part)
                out.flush()
    except BrokenPipeError:
        os._exit(0)  # nobody listens any more: what was asked for has been done, or goes on without this process


def serve(stream: Any, origin: Origin) -> bytes:
    """The whole framed answer to the request on `stream`; every failure is an answer too."""
    return b"".join(answers(stream, origin))


def answers(stream: Any, origin: Origin) -> Iterator[bytes]:
    """The framed answers to the request on `stream`: one, or as many as `follow` has to give."""
    from .paths import Root
    from .protocol import AgentError, Arguments, Reply, encode_reply, read_request, shown

    try:
        agent: str | None = origin.sha256
    except (AgentError, OSError):
        agent = None
    payload: Payload | None = None
    try:
        request = read_request(stream)
        payload = request.payload
        verb = VERBS.get(request.verb)
        if verb is None:
            raise AgentError("protocol", f"verb={shown(request.verb)} is not one of {', '.join(sorted(VERBS))}")
        arguments = Arguments(request.verb, request.args)
        reply = verb(Root(request.root), arguments, request.payload, origin)
        for one in [reply] if isinstance(reply, Reply) else reply:
            yield encode_reply({"ok": True, "result": one.result, "agent": agent}, one.payload)
    except Exception as error:
        told = error if isinstance(error, AgentError) else _unforeseen(error)
        with contextlib.suppress(AgentError, OSError):
            if payload is not None:
                payload.drain()  # a sender that meets a closed pipe never hears why
        yield encode_reply({"ok": False, "error": told.as_json(), "agent": agent})


def _unforeseen(error: Exception) -> AgentError:
    import errno
    import traceback

    from .protocol import REFUSED, UNKNOWN, AgentError

    story = "".join(traceback.format_exception(type(error), error, error.__traceback__))[-4000:]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"no space left on the host for {error.filename or 'this'}"
        return AgentError("disk-full", message, next="free some space on the host", code=REFUSED)
    if isinstance(error, PermissionError):
        message = f"{error.filename or 'a file'} on the host: {error.strerror}"
        return AgentError("refused", message, next="make it accessible to this user", code=REFUSED)
    return AgentError("internal", f"{type(error).__name__}: {error}", code=UNKNOWN, detail={"traceback": story})


def _answer_old_python() -> None:
    import json

    version = ".".join(str(part) for part in sys.version_info[:3])
    message = "python3 on this host is " + version + "; the agent needs 3.10 or later"
    error = {"kind": "old-python", "message": message, "next": "install a newer python3", "code": 2, "detail": {}}
    body = json.dumps({"ok": False, "error": error, "agent": None, "payload_bytes": 0}).encode()
    sys.stdout.buffer.write(b"\n=LF-BEGIN %d=\n" % len(body) + body + b"\n=LF-END=\n")
    sys.stdout.buffer.flush()


def _probe(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .probe import probe
    from .protocol import Reply

    return Reply(probe(root, args, origin.sha256))


def _preflight(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .probe import probe
    from .protocol import Reply

    return Reply(probe(root, args, may_act=True))


def _status(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .protocol import Reply
    from .state import derive

    runs, beginning = args.texts("runs"), args.optional_text("beginning")
    args.done()
    if beginning is not None:
        runs += [one.id for one in root.runs_present() if one.id.startswith(beginning)]
    return Reply({run: derive(root.run(run)) for run in runs})


def _read(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .reading import read

    return read(root, args)


def _follow(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Iterator[Reply]:
    from .reading import follow

    return follow(root, args)


def _put(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .cas import held, put
    from .protocol import Reply

    sha256, ask = args.text("sha256"), args.flag("ask")
    offset = int(args.number("offset", 0, low=0, high=1 << 50))
    args.done()
    path = str(root.object(sha256))
    if ask:
        there, have = held(root, sha256)
        return Reply({"sha256": sha256, "stored": False, "there": there, "have": have, "path": path})
    stored, there = put(root, sha256, payload, offset)
    return Reply({"sha256": sha256, "stored": stored, "there": there, "path": path})


def _install(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .cas import install
    from .protocol import Reply

    args.done()
    return Reply({"sha256": origin.sha256, "path": str(install(root, origin))})


def _reserve(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .processes import no_core_files
    from .protocol import Reply
    from .reserving import reserve
    from .state import derive

    no_core_files()  # it may be given secrets
    run, identity, launch = args.text("run"), args.text("identity"), args.table("launch", required=True)
    secrets = args.table("secrets")
    args.done()
    made = reserve(root, run, identity, launch, secrets)
    return Reply({"created": made, "dir": str(root.run(run).dir), "state": derive(root.run(run))})


def _launch(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .launching import launch
    from .protocol import Reply

    chain, wait_lease = args.texts("chain"), args.flag("wait_lease")
    runner = args.optional_text("runner") or "detached"
    args.done()
    return Reply(launch(root, chain, wait_lease, origin, runner))


def _collect(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .collecting import collect
    from .protocol import Reply

    run = root.run(args.text("run"))
    args.done()
    return Reply(collect(run))


def _fetch(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .collecting import fetch

    return fetch(root, args)


def _cancel(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .cancelling import cancel, grace_of
    from .protocol import Reply

    run = root.run(args.text("run"))
    grace = args.number("grace", grace_of(run), low=0.0, high=600.0)
    by = args.optional_text("by")
    args.done()
    return Reply(cancel(run, grace, by))


def _gc(root: Root, args: Arguments, payload: Payload, origin: Origin) -> Reply:
    from .gc import apply
    from .protocol import Reply
    from .rubbish import Wishes

    wishes, names = Wishes.of(args), args.rows("names")
    args.done()
    return Reply(apply(root, wishes, origin.sha256, names))


VERBS: dict[str, Callable[[Root, Arguments, Payload, Origin], Reply | Iterator[Reply]]] = {
    "probe": _probe,
    "preflight": _preflight,
    "status": _status,
    "read": _read,
    "follow": _follow,
    "put": _put,
    "install": _install,
    "reserve": _reserve,
    "launch": _launch,
    "collect": _collect,
    "fetch": _fetch,
    "cancel": _cancel,
    "gc": _gc,
}
#: Verbs that create and change nothing on the host.
READ_ONLY = frozenset({"probe", "status", "read", "follow", "collect", "fetch"})
