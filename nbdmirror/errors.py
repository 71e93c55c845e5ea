"""Every exception that nbdmirror raises on purpose, in one tree.

::

    NbdmirrorError            exit 1; a message says what happened, to what, and what to do
      UsageError              exit 2; a command was called wrongly
      ConfigError             exit 2; the configuration (file, key, what would be right)
      TimedOut                exit 3; a wait ended without its condition
      Refused                 exit 4; it would lose data; the hint names the flag that forces it
      NoDaemon                exit 5; nobody answers at the admin socket
      StateError              exit 1; state on disk is missing, damaged, or of another group
      FormatError             exit 1; bytes that are not what their format says (disk or wire)
        PeerError             the peer broke the replication protocol: close the session
      DiskFailed              exit 1; an I/O error that is final for its file (O16)
      VolumeFailed            no facet can answer; carries the errno for the client

Classes differ by what the caller may do: retry, refuse, close, or give up.
"""

from __future__ import annotations

import errno


class NbdmirrorError(Exception):
    """Base of all; ``exit_code`` is what a command ends with, ``hint`` the next thing to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(NbdmirrorError):
    """A command was called in a way that it does not have."""

    exit_code = 2


class ConfigError(NbdmirrorError):
    """The configuration cannot be used; the message names the file, the key and what is right."""

    exit_code = 2


class TimedOut(NbdmirrorError):
    """A wait ended before its condition came true."""

    exit_code = 3


class Refused(NbdmirrorError):
    """Refused because it would lose data; ``hint`` names the flag that forces it."""

    exit_code = 4


class NoDaemon(NbdmirrorError):
    """No daemon answers at the socket."""

    exit_code = 5


class StateError(NbdmirrorError):
    """A node's durable state is missing, damaged, or belongs to something else."""


class FormatError(NbdmirrorError):
    """Bytes that do not follow their format: a checksum, a magic, a length, a version."""


class PeerError(FormatError):
    """The peer sent what the replication protocol does not allow; the session ends."""


class DiskFailed(NbdmirrorError):
    """An I/O error that is final for this file: it is not used again by this process (O16)."""

    def __init__(self, message: str, *, number: int = errno.EIO, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno = number


class VolumeFailed(NbdmirrorError):
    """No facet can answer a request; ``errno`` is what the client gets."""

    def __init__(self, message: str, *, number: int = errno.EIO, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno = number


def os_error_text(error: OSError) -> str:
    """What happened, and to what file, without the number."""
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


MORE_DESCRIPTORS = "raise LimitNOFILE (ulimit -n)"
"""The hint where descriptors are too few."""


def lacks_descriptors(error: Exception) -> bool:
    """Whether a file was not opened for want of descriptors."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def refuse_shortage(error: Exception) -> None:
    """StateError if a file was not opened for want of descriptors: that says nothing of the file,
    and at a start it must cost neither a facet its place nor a snapshot its life (I8)."""
    if lacks_descriptors(error):
        raise StateError(
            f"there are too few descriptors for the files of this node: {error}",
            hint=f"{MORE_DESCRIPTORS}, and start it again: nothing is lost",
        ) from error
