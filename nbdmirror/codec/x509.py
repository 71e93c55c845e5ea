"""What is asked of an X509 certificate as DER: its public key, for a pin, and when it ends.

Walks the outer structure only; the certificate was verified by TLS before, or is our own. Fields
that are not wanted are skipped by their lengths::

    Certificate { TBSCertificate { [0] version?, serial, signature, issuer,
                                   validity { not before, not after }, subject,
                                   SubjectPublicKeyInfo, ... }, ... }
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from nbdmirror.errors import FormatError

_SEQUENCE = 0x30
_VERSION = 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_VALIDITY, _KEY = 3, 5  # places behind the version


def pin(certificate: bytes) -> str:
    """SHA-256 of the public key, in hexadecimal: the digest that ``openssl pkey -pubin -outform
    der | sha256sum`` prints. FormatError if this is no certificate."""
    at = _field(certificate, _KEY)
    _, _, end = _element(certificate, at, _SEQUENCE)
    return hashlib.sha256(certificate[at:end]).hexdigest()


def expires_at(certificate: bytes) -> float:
    """When the certificate ends, in seconds since 1970. FormatError if this is no certificate."""
    start, _, _ = _element(certificate, _field(certificate, _VALIDITY), _SEQUENCE)
    _, _, at = _element(certificate, start, None)
    start, length, _ = _element(certificate, at, None)
    text = certificate[start : start + length].decode("ascii", "replace")
    if certificate[at] == _UTC_TIME and text.isascii() and text[:2].isdigit():
        text = ("20" if int(text[:2]) < 50 else "19") + text
    elif certificate[at] != _GENERALIZED_TIME:
        raise FormatError("not a certificate: its end is no time")
    try:
        return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise FormatError("not a certificate: its end is no time") from None


def _field(certificate: bytes, place: int) -> int:
    """Where a field of the TBSCertificate begins."""
    start, _, _ = _element(certificate, 0, _SEQUENCE)
    at, _, _ = _element(certificate, start, _SEQUENCE)
    if at < len(certificate) and certificate[at] == _VERSION:
        _, _, at = _element(certificate, at, None)
    for _ in range(place):
        _, _, at = _element(certificate, at, None)
    return at


def _element(data: bytes, at: int, tag: int | None) -> tuple[int, int, int]:
    """(start of the content, its length, end) of the element at ``at``."""
    if at + 2 > len(data) or (tag is not None and data[at] != tag):
        raise FormatError("not a certificate: its structure is another")
    first = data[at + 1]
    start = at + 2
    if first < 0x80:
        length = first
    else:
        count = first & 0x7F
        if not 1 <= count <= 4 or start + count > len(data):
            raise FormatError("not a certificate: a length is malformed")
        length = int.from_bytes(data[start : start + count], "big")
        start += count
    if start + length > len(data):
        raise FormatError("not a certificate: it is cut short")
    return start, length, start + length
