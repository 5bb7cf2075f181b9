"""A model folder of this laptop as a source: listed by content, sent by rsync where both ends have it, or in pieces."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.places import Places
from dispatch.pulling.listing import Listing, ModelFile, checked
from dispatch.pulling.refs import ModelRef, parse_ref
from dispatch.transport.call import Transport
from dispatch.transport.retry import call
from dispatch.transport.sending import send
from latentforge.errors import RefusedError
from latentforge.evidence.digests import tree_files

PIECE = 16 << 20
_ASK_AT_ONCE = 1000
_RSYNC_ATTEMPTS = 3


@dataclass(frozen=True)
class LocalFolder:
    """A folder, and the name that its model gets on hosts."""

    path: Path
    name: str


def list_folder(folder: LocalFolder) -> Listing:
    """Every file of the folder with its digest, and the digests of the pieces that it is sent in; each is read once."""
    if "/" in folder.name or "@" in folder.name or str(parse_ref(folder.name, revision="x")) != f"{folder.name}@x":
        raise RefusedError(
            f"--name {folder.name!r} cannot name a model: letters, digits, dot, hyphen and underscore only"
        )
    if not folder.path.is_dir():
        state = "is a file, not a folder" if folder.path.exists() else "does not exist"
        raise RefusedError(f"{folder.path} {state} on this laptop", next="name the folder that holds config.json")
    files = []
    for relative, path in tree_files(folder.path):
        whole, pieces, size = hashlib.sha256(), [], 0
        for piece in _pieces(path):
            whole.update(piece)
            pieces.append(hashlib.sha256(piece).hexdigest())
            size += len(piece)
        files.append(ModelFile(relative, size, whole.hexdigest(), tuple(pieces)))
    unpinned = Listing(ModelRef(folder.name, "0" * 40), tuple(files))
    return checked(Listing(ModelRef(folder.name, unpinned.tree_sha256[:40]), unpinned.files))


def send_folder(
    folder: LocalFolder,
    listing: Listing,
    facts: HostFacts,
    transport: Transport,
    places: Places,
    *,
    say: Callable[[str], None],
) -> int:
    """Bring to the host what it lacks of a folder, for its pull to verify and put in place; the bytes that were sent.

    By rsync into the pull's own folder, where both ends have it; what rsync leaves undone goes in pieces.
    """
    fact = facts.models[listing.ref.folder]
    there = {name: size for name, size in fact.present.items() if name not in fact.bad}
    missing = [file for file in listing.files if there.get(file.path) != file.bytes]
    if not missing:
        return 0
    if facts.rsync and not fact.sha256 and (client := shutil.which("rsync")) and not transport.host.is_local:
        ended = _rsync(client, folder, listing, missing, facts, transport.host, places)
        if ended is None:
            say(f"sent {len(missing)} files by rsync, {sum(file.bytes for file in missing) / 1e6:.1f} MB")
            return sum(file.bytes for file in missing)
        say(f"rsync did not come to its end ({ended}); sending in pieces")
    return _send_pieces(folder, missing, transport, say)


def _send_pieces(
    folder: LocalFolder, missing: list[ModelFile], transport: Transport, say: Callable[[str], None]
) -> int:
    wanted = sorted({piece for file in missing for piece in file.pieces})
    there: set[str] = set()
    for at in range(0, len(wanted), _ASK_AT_ONCE):
        found = call(transport, "probe", {"cas": wanted[at : at + _ASK_AT_ONCE]}).result["cas"]
        there |= {piece for piece, held in found.items() if held}
    sent = 0
    for file in missing:
        say(f"sending {file.path}, {file.bytes / 1e6:.1f} MB in {len(file.pieces)} pieces")
        for piece, content in zip(file.pieces, _pieces(folder.path / file.path), strict=False):
            if piece in there:
                continue
            if hashlib.sha256(content).hexdigest() != piece:
                raise RefusedError(
                    f"{folder.path / file.path} changed while it was sent", next="the same command again"
                )
            sent += send(transport, piece, content)
            there.add(piece)
    return sent


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        while piece := stream.read(PIECE):
            yield piece


def _rsync(
    client: str,
    folder: LocalFolder,
    listing: Listing,
    missing: list[ModelFile],
    facts: HostFacts,
    host: Host,
    places: Places,
) -> str | None:
    """Send files by rsync over ssh, with our pinned keys; None where it succeeded, else its last word."""
    place = f"{facts.root}/models/{listing.ref.folder}"
    user = f"{host.user}@" if host.user else ""
    argv = [
        *(client, "--recursive", "--copy-links", "--mkpath", "--protect-args", "--files-from=-", "--from0"),
        *(
            "--chmod=D700,F600",
            "--timeout=30",
            f"--partial-dir={place}/rsync-partial",
            "--rsh",
            shlex.join(_ssh(host, places)),
        ),
        # Absolute: a relative one may begin as an option does, or name a host before a colon.
        *(f"{folder.path.absolute()}/", f"{user}{host.address}:{place}/tree/"),
    ]
    names = b"\0".join(os.fsencode(file.path) for file in missing)
    for _ in range(_RSYNC_ATTEMPTS):  # each goes on where the one before was cut
        ended = subprocess.run(argv, input=names, capture_output=True, check=False, start_new_session=True)
        if ended.returncode == 0:
            return None
    said = ended.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"status {ended.returncode}" + (f": {said[0]}" if said else "")


def _ssh(host: Host, places: Places) -> list[str]:
    """OpenSSH's client as our own connections are: pinned keys and no others, nothing asked, nothing forwarded."""
    options = {
        "UserKnownHostsFile": str(places.known_hosts(host.name)),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": host.name,
        "StrictHostKeyChecking": "yes",
        "BatchMode": "yes",
        "ForwardAgent": "no",
        "ClearAllForwardings": "yes",
        "ConnectTimeout": "8",
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        **({"IdentitiesOnly": "yes"} if host.identity else {}),
    }
    words = ["ssh", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    words += ["-p", str(host.port)] if host.port else []
    return words + (["-i", str(Path(host.identity).expanduser())] if host.identity else [])
