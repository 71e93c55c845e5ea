"""TLS: contexts from files, who the other side is, and the word for why it is refused.

Owns every setting of OpenSSL that the product uses. There is no "prefer": a context is made or the
node does not start, and a connection that fails is closed, never carried on in plain text. Used by
``edge.peers`` and, for NBD, by the engine through ``ports.TlsServer``.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import tempfile
from collections.abc import Callable
from typing import Any

from nbdmirror.codec import x509
from nbdmirror.config import TlsConfig
from nbdmirror.edge.secrets import check_secret, resolve
from nbdmirror.errors import ConfigError, FormatError

SHUTDOWN_SECONDS = 2.0
"""A peer gets so long to answer our goodbye."""

# Groups of RFC 7919 need no secret and no generation: ffdhe2048.
_DH_PARAMETERS = """-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
_ANONYMOUS = "ADH-AES256-GCM-SHA384:ADH-AES128-GCM-SHA256:@SECLEVEL=0"

# OpenSSL's numbers (X509_V_ERR_...) for what a person has to know by its name.
_VERIFY_WORDS = {
    9: "not yet valid: the certificate's time has not come",
    10: "expired: the certificate's time is over",
    18: "wrong CA: the certificate is self-signed",
    19: "wrong CA: the certificate comes from a CA that is not trusted here",
    20: "wrong CA: the certificate comes from a CA that is not trusted here",
    21: "wrong CA: the certificate comes from a CA that is not trusted here",
    26: "wrong purpose: the certificate is not made for this side of a connection",
}
_NO_COMMON_GROUND = "no common ground: does the peer use a secret, or certificates?"
# What OpenSSL calls the failure, and the alerts of the other side.
_REASON_WORDS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "missing certificate: the peer showed none",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "missing certificate: the peer wants one",
    "TLSV1_ALERT_UNKNOWN_CA": "wrong CA: the peer does not trust the CA of our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "expired: the peer says that our certificate is",
    "SSLV3_ALERT_BAD_CERTIFICATE": "bad certificate: the peer does not take ours",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "bad certificate: the peer does not take ours",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": _NO_COMMON_GROUND,
    "NO_SHARED_CIPHER": _NO_COMMON_GROUND,
    "UNSUPPORTED_PROTOCOL": _NO_COMMON_GROUND,
    "TLSV1_ALERT_PROTOCOL_VERSION": _NO_COMMON_GROUND,
    "WRONG_VERSION_NUMBER": "not TLS: the peer speaks something else",
    "HTTP_REQUEST": "not TLS: the peer speaks HTTP",
}


def word(error: BaseException) -> str:
    """Why a handshake failed, beginning with the word for it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY_WORDS.get(error.verify_code, f"bad certificate: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        return _REASON_WORDS.get(reason, reason.replace("_", " ").lower())
    if isinstance(error, TimeoutError) or "longer than" in str(error):
        return "too slow: the handshake had no end"
    return f"hung up: {error}" if str(error) else "hung up"


def certificate_context(config: TlsConfig, *, server: bool) -> ssl.SSLContext:
    """TLS with certificates on both sides; ConfigError names the file that cannot be used.

    Names are not compared with host names: who the peer is, its caller decides by its names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _no_resumption(context, server)
    key, cert, ca = check_secret(config.key), resolve(config.cert), resolve(config.client_ca)
    for path in (cert, ca):
        if not os.path.isfile(path):
            hint = "make it, or name the file that is meant"
            raise ConfigError(f"{path}: missing: there is no such file", hint=hint)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{cert} and {key} are no certificate and its key: {error}") from None
    try:
        context.load_verify_locations(ca)
    except OSError as error:
        raise ConfigError(f"{ca} holds no CA certificate: {error}") from None
    return context


def expiry(config: TlsConfig) -> float:
    """When this side's certificate ends, in seconds since 1970; ConfigError if it has no end."""
    path = resolve(config.cert)
    try:
        with open(path, encoding="ascii") as file:
            text = file.read()
        end = text.index(ssl.PEM_FOOTER) + len(ssl.PEM_FOOTER)  # ours is the first of a chain
        der = ssl.PEM_cert_to_DER_cert(text[text.index(ssl.PEM_HEADER) : end])
        return x509.expires_at(der)
    except (OSError, ValueError, FormatError) as error:
        raise ConfigError(f"{path} is no certificate: {error}") from None


def anonymous_context(*, server: bool) -> ssl.SSLContext:
    """TLS that keeps secrets from listeners and proves nobody: the base of the shared secret.

    TLS 1.2, because anonymous key exchange is in no later one; both ends are ours, there is
    nothing to fall back to. ConfigError if this OpenSSL does without."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    _no_resumption(context, server)
    try:
        context.set_ciphers(_ANONYMOUS)
    except ssl.SSLError:
        raise ConfigError(
            "OpenSSL here has no anonymous key exchange, which secret_file builds on",
            hint="use tls with certificates",
        ) from None
    if server:
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
            file.write(_DH_PARAMETERS)
            file.flush()
            context.load_dh_params(file.name)
    return context


def _no_resumption(context: ssl.SSLContext, server: bool) -> None:
    """Every connection proves anew who it is."""
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    if server:
        context.num_tickets = 0


def _no_password() -> str:
    raise ValueError("the key is encrypted; a daemon has nobody to ask")


def channel_binding(transport: asyncio.BaseTransport) -> bytes:
    """What only the two ends of this very TLS connection share (RFC 5929, tls-unique)."""
    binding: bytes | None = transport.get_extra_info("ssl_object").get_channel_binding("tls-unique")
    assert binding
    return binding


class Identity:
    """What a verified certificate says of its owner."""

    def __init__(self, transport: asyncio.BaseTransport) -> None:
        tls = transport.get_extra_info("ssl_object")
        found: dict[str, Any] = tls.getpeercert() or {}
        subject = [pair for group in found.get("subject", ()) for pair in group]
        alternatives = found.get("subjectAltName", ())
        names = [value for key, value in alternatives if key == "DNS"]
        names += [value for key, value in subject if key == "commonName"]
        self.names: tuple[str, ...] = tuple(dict.fromkeys(names))
        self.uris: tuple[str, ...] = tuple(v for k, v in alternatives if k == "URI")
        self._certificate: bytes = tls.getpeercert(binary_form=True) or b""

    def pinned(self, pins: tuple[str, ...]) -> bool:
        """Whether its key is one of those that are taken; no pins take every key."""
        try:
            return not pins or x509.pin(self._certificate) in pins
        except FormatError:
            return False


class NbdTls:
    """``ports.TlsServer`` for NBD clients: certificates on both sides."""

    def __init__(self, config: TlsConfig, handshake_seconds: float) -> None:
        """ConfigError if a file cannot be used."""
        self._seconds = handshake_seconds
        self._context: ssl.SSLContext
        self._pins: tuple[str, ...]
        self._expires: float
        self.prepare(config)()

    def prepare(self, config: TlsConfig) -> Callable[[], None]:
        """Reads the files again (ConfigError); the call of the result puts them to use."""
        context, expires = certificate_context(config, server=True), expiry(config)

        def apply() -> None:
            self._context, self._pins, self._expires = context, config.pins, expires

        return apply

    async def secure(
        self, transport: asyncio.Transport, protocol: asyncio.BufferedProtocol
    ) -> tuple[asyncio.Transport, tuple[str, ...]]:
        """See ``ports.TlsServer``."""
        loop = asyncio.get_running_loop()
        try:
            secured = await loop.start_tls(
                transport,
                protocol,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._seconds,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )
        except (OSError, ssl.SSLError) as error:
            raise ConnectionError(word(error)) from error
        if secured is None or secured.get_extra_info("ssl_object") is None:
            raise ConnectionError("hung up")  # aborted here, which is no error to the loop
        identity = Identity(secured)
        if not identity.pinned(self._pins):
            secured.abort()
            raise ConnectionError("wrong key: it is not pinned here")
        return secured, identity.names

    def expires_at(self) -> float | None:
        """See ``ports.Peers``."""
        return self._expires
