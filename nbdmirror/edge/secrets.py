"""Files that hold secrets: found, checked, read. Their content never gets into a message.

Owns the rule for such files: a regular file of root or of the daemon's user that nobody else can
read (root, who checks for others, takes any owner). ``credential:NAME`` is a systemd credential
(LoadCredential), whose directory the service manager guards. Called when a node starts, and again
at a reload.
"""

from __future__ import annotations

import os
import stat

from nbdmirror.codec.peerauth import SECRET_BYTES_MIN
from nbdmirror.configsecurity import CREDENTIAL
from nbdmirror.errors import ConfigError

SECRET_BYTES_MAX = 64 << 10
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def resolve(path: str) -> str:
    """The file behind a path or ``credential:NAME``; ConfigError if there are no credentials."""
    if not path.startswith(CREDENTIAL):
        return path
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise ConfigError(
            f"{path}: this process was given no credentials",
            hint="LoadCredential= in the unit gives them; or name a file",
        )
    return os.path.join(directory, path.removeprefix(CREDENTIAL))


def check_secret(path: str) -> str:
    """The file's name if it may hold a secret; ConfigError says what is wrong with it."""
    name = resolve(path)
    try:
        found = os.stat(name)
    except OSError as error:
        hint = "make it, or name the file that is meant"
        raise ConfigError(f"{name}: {_missing(error)}", hint=hint) from None
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{name}: not a regular file")
    if os.geteuid() != 0 and found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{name}: belongs to uid {found.st_uid}, who could change it",
            hint="give it to root or to the user of the daemon",
        )
    # A credential belongs to root and is opened to the service by an ACL, which shows as a group.
    guarded = path.startswith(CREDENTIAL) and not found.st_mode & stat.S_IRWXO
    if found.st_mode & _OTHERS and not guarded:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(f"{name}: mode {mode:04o}: others can read it", hint=f"chmod 600 {name}")
    return name


def read_secret(path: str) -> bytes:
    """The secret in the file, without the space around it; ConfigError if it is too short."""
    name = check_secret(path)
    try:
        with open(name, "rb") as file:
            secret = file.read(SECRET_BYTES_MAX + 1).strip()
    except OSError as error:
        raise ConfigError(f"{name}: {_missing(error)}") from None
    if not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
        raise ConfigError(
            f"{name}: holds {len(secret)} bytes, a secret has at least {SECRET_BYTES_MIN}",
            hint=f"openssl rand -hex {SECRET_BYTES_MIN} > {name}",
        )
    return secret


def _missing(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing: there is no such file"
    return f"cannot be read: {error.strerror}"
