"""Signatures of SSH keys over evidence: made and checked by OpenSSH's own ``ssh-keygen -Y``."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from latentforge.errors import FailedError, RefusedError, UnknownOutcomeError
from latentforge.spec.reading import UnreadableError

NAMESPACE = "latentforge-evidence"
"""What the signatures are for: one made for git or for a file of another program does not pass as evidence."""

SUFFIX = ".sig"
_LARGEST = 1 << 16  # a signature is a few hundred bytes, of a large RSA key some thousands
_MOST_SIGNERS = 1 << 20  # ten thousand of them
_SECONDS = 30.0


@dataclass(frozen=True)
class Signature:
    """A good signature: its file, the key (``ED25519 SHA256:…``), and who it is.

    ``signer`` is the name that the allowed-signers file gives the key; None where no such file was named, so that the
    key may be anybody's.
    """

    file: str
    key: str
    signer: str | None

    @property
    def told(self) -> str:
        """The signature in the words of a verification."""
        return f"signed by {self.signer}" if self.signer is not None else f"signed with {self.key}, whose was not asked"


def sign_bytes(content: bytes, key: Path) -> bytes:
    """The armoured signature of ``content``; ``key`` is a private key, or a public one whose other half an agent holds.

    RefusedError where there is no such key or it does not sign (a passphrase is asked for on the terminal).
    """
    if not os.path.isfile(key):
        raise RefusedError(f"there is no key {key}", next=f"ssh-keygen -t ed25519 -f {key}")
    done = _ssh_keygen(["sign", "-f", str(key), "-n", NAMESPACE], content, seconds=None)
    if done.returncode != 0 or not done.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        raise RefusedError(f"{key} does not sign: {_words(done)}", next=f"ssh-add {key}   (or another key, with --key)")
    return done.stdout


def check_signature(content: bytes, file: Path, signers: Path | None, *, name: str | None = None) -> Signature:
    """The signature in ``file`` over ``content``, by a key of ``signers`` (OpenSSH's allowed signers) if given.

    ``name`` is what the file is called in the result; errors say only what is wrong with it. FailedError where the
    signature is not one of these bytes, or of no key that ``signers`` names for this namespace and this day;
    UnknownOutcomeError where it cannot be checked here.
    """
    name = name or file.name
    try:
        found = os.stat(file)
    except OSError as error:
        raise UnreadableError.of(file, error) from None
    if not stat.S_ISREG(found.st_mode) or not 0 < found.st_size <= _LARGEST:
        raise FailedError(f"is no signature: {_strange(found)}")
    checked = _ssh_keygen(["check-novalidate", "-n", NAMESPACE, "-s", str(file)], content)
    if checked.returncode != 0:
        raise FailedError(f"is a bad signature: {_words(checked)}")
    key = checked.stdout.decode("utf-8", "replace").partition(" with ")[2].strip().replace(" key ", " ")
    if signers is None:
        return Signature(name, key, None)
    principals = _ssh_keygen(["find-principals", "-f", str(signers), "-s", str(file)])
    refused = principals
    for principal in principals.stdout.decode("utf-8", "replace").split("\n"):
        if not principal or principal.startswith("!"):
            continue
        refused = _ssh_keygen(
            ["verify", "-f", str(signers), "-I", principal, "-n", NAMESPACE, "-s", str(file)], content
        )
        if refused.returncode == 0:
            return Signature(name, key, principal)
    raise FailedError(f"is a signature of {key}, which {signers} does not name: {_words(refused)}")


def allowed_signers(named: str | None) -> Path | None:
    """The allowed-signers file that ``--signers``, else ``EVIDENCE_SIGNERS``, names; refused where it is no file."""
    source = "EVIDENCE_SIGNERS" if named is None else "--signers"
    text = os.environ.get("EVIDENCE_SIGNERS") if named is None else named
    if named is None and not text:
        return None
    path = os.path.expanduser(text or "")
    if not os.path.isfile(path):
        raise RefusedError(
            f"there is no file of allowed signers at {text!r} ({source})",
            next=f'echo "you@example.org $(cat ~/.ssh/id_ed25519.pub)" >> {text or "allowed_signers"}',
        )
    if not os.access(path, os.R_OK) or os.path.getsize(path) > _MOST_SIGNERS:
        raise RefusedError(f"the allowed signers at {text!r} ({source}) cannot be read, or have more than 1 MiB")
    return Path(path)


def _ssh_keygen(
    arguments: list[str], content: bytes = b"", *, seconds: float | None = _SECONDS
) -> subprocess.CompletedProcess[bytes]:
    command = ["ssh-keygen", "-Y", *arguments]
    try:
        return subprocess.run(command, input=content, capture_output=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise UnknownOutcomeError(
            "ssh-keygen, which makes and checks signatures, is not on this machine", next="install openssh-client"
        ) from None
    except subprocess.TimeoutExpired:
        raise UnknownOutcomeError(f"ssh-keygen -Y {arguments[0]} gave no answer in {_SECONDS:.0f} s") from None


def _strange(found: os.stat_result) -> str:
    return f"a file of {found.st_size} bytes" if stat.S_ISREG(found.st_mode) else "no regular file"


def _words(done: subprocess.CompletedProcess[bytes]) -> str:
    """What ssh-keygen said, in one line."""
    text = done.stderr.decode("utf-8", "replace").replace("Signing data on standard input", "")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or f"ssh-keygen ended with {done.returncode}"
