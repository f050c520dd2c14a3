"""TLS and basic auth for the stand-alone exporter, from a web configuration file as Prometheus' own exporters have it.

The file is YAML::

    tls_server_config:
      cert_file: server.crt          # relative to this file
      key_file: server.key
      client_auth_type: RequireAndVerifyClientCert   # optional, with client_ca_file
      client_ca_file: clients.crt
      min_version: TLS12             # or TLS13
    basic_auth_users:
      prometheus: $2y$10$...         # bcrypt, as `htpasswd -nBC 10 prometheus` prints it

Both parts are optional. The file, certificate and key are read again when they change, so that certificates can be
renewed; what cannot be read then is said in the log, and what was there before stays.
Needs the extra ``moe-monitor[web]`` (PyYAML and bcrypt).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
import re
import secrets
import ssl
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENTS = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_TLS_KEYS = ("cert_file", "key_file", "client_auth_type", "client_ca_file", "min_version")
_HASH = re.compile(r"\$2[aby]\$(?:0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")
#: bcrypt looks at no more of a password.
_BCRYPT_BYTES = 72
#: Passwords found right that are remembered: bcrypt takes a tenth of a second, a scrape should not.
_REMEMBERED = 64


class WebConfigError(Exception):
    """The web configuration cannot be used; the message says which file, which entry and why."""


@dataclass(frozen=True)
class _Parsed:
    tls: ssl.SSLContext | None
    users: dict[str, bytes]
    files: tuple[Path, ...] = field(default=())


def _bcrypt() -> Any:
    try:
        import bcrypt
    except ImportError:
        raise WebConfigError("basic_auth_users needs bcrypt: pip install 'moe-monitor[web]'") from None
    return bcrypt


def _parse(path: Path) -> _Parsed:
    try:
        import yaml
    except ImportError:
        raise WebConfigError("a web configuration needs PyYAML: pip install 'moe-monitor[web]'") from None
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WebConfigError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise WebConfigError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())[:200]}") from error
    entries = _mapping(path, "the file", {} if data is None else data, ("tls_server_config", "basic_auth_users"))
    tls, files = _tls(path, entries["tls_server_config"]) if entries.get("tls_server_config") else (None, ())
    users = {}
    named = entries.get("basic_auth_users") or {}
    for name, value in _mapping(path, "basic_auth_users", named, None).items():
        _bcrypt()
        if not _HASH.fullmatch(str(value)):
            raise WebConfigError(f"{str(path)!r}: the password of {name[:100]!r} is not a bcrypt hash")
        users[name] = str(value).encode()
    return _Parsed(tls, users, (path, *files))


def _mapping(path: Path, what: str, data: Any, allowed: tuple[str, ...] | None) -> dict[str, Any]:
    """Refuses what is unknown: an entry without effect would be taken for protection."""
    if not isinstance(data, dict):
        raise WebConfigError(f"{str(path)!r}: {what} must be a mapping")
    for key in data:
        if not isinstance(key, str) or (allowed is not None and key not in allowed):
            known = "" if allowed is None else f"; supported: {', '.join(allowed)}"
            raise WebConfigError(
                f"{str(path)!r}: {what} has the entry {str(key)[:100]!r}, which is not supported{known}"
            )
    return data


def _tls(path: Path, data: Any) -> tuple[ssl.SSLContext, tuple[Path, ...]]:
    entries = _mapping(path, "tls_server_config", data, _TLS_KEYS)
    texts = {key: str(value) for key, value in entries.items() if value}
    if "cert_file" not in texts or "key_file" not in texts:
        raise WebConfigError(f"{str(path)!r}: tls_server_config needs cert_file and key_file")
    files = {key: path.parent / texts[key] for key in ("cert_file", "key_file", "client_ca_file") if key in texts}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    clients = texts.get(
        "client_auth_type", "RequireAndVerifyClientCert" if "client_ca_file" in texts else "NoClientCert"
    )
    try:
        context.minimum_version = _VERSIONS[texts.get("min_version", "TLS12")]
        verify = _CLIENTS[clients]
    except KeyError as error:
        allowed = ", ".join((*_VERSIONS, *_CLIENTS))
        raise WebConfigError(f"{str(path)!r}: {error} is not supported; known: {allowed}") from None
    if verify != ssl.CERT_NONE and "client_ca_file" not in files:
        raise WebConfigError(f"{str(path)!r}: {clients} needs client_ca_file")
    at = files["cert_file"]
    try:
        context.load_cert_chain(files["cert_file"], files["key_file"], password=lambda: b"")
        if "client_ca_file" in files:
            at = files["client_ca_file"]
            context.load_verify_locations(at)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise WebConfigError(f"{str(path)!r}: cannot use {str(at)!r} or its key: {why}") from error
    context.verify_mode = verify
    return context, tuple(files.values())


class WebConfig:
    """Who may look, and over what. Thread-safe. Raises WebConfigError when the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[Any, ...] = ()
        self._parsed = _parse(path)
        self._seen = self._stamps()
        self._key = secrets.token_bytes(16)
        self._right: OrderedDict[bytes, None] = OrderedDict()
        self._checking = threading.Lock()

    def _stamps(self) -> tuple[Any, ...]:
        stamps: list[Any] = []
        for file in self._parsed.files:
            try:
                info = os.stat(file)
                stamps.append((info.st_mtime_ns, info.st_size, info.st_ino))
            except OSError:
                stamps.append(None)
        return tuple(stamps)

    def _current(self) -> _Parsed:
        with self._lock:
            stamps = self._stamps()
            if stamps != self._seen:
                self._seen = stamps
                try:
                    self._parsed = _parse(self._path)
                    self._seen = self._stamps()
                    self._right.clear()
                    logger.info("%s was read again", self._path)
                except WebConfigError as error:
                    logger.warning("the web configuration stays as it was: %s", error)
            return self._parsed

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The context for a new connection; None for plain HTTP."""
        return self._current().tls

    def allows(self, authorization: str) -> bool:
        """Whether a request with this Authorization header may be answered."""
        users = self._current().users
        if not users:
            return True
        scheme, _, encoded = authorization.strip().partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            name, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        return bool(colon) and self._matches(users, name.decode("utf-8", "replace"), password)

    def _matches(self, users: dict[str, bytes], name: str, password: bytes) -> bool:
        known = name in users
        # A name that nobody has takes as long as one that somebody has.
        stored = users[name] if known else next(iter(users.values()))
        key = hmac.digest(self._key, hashlib.sha256(name.encode()).digest() + stored + password, "sha256")
        with self._lock:
            if known and key in self._right:
                return True
        with self._checking:  # guessing passwords keeps one core busy at most
            try:
                right = bool(_bcrypt().checkpw(password[:_BCRYPT_BYTES], stored)) and known
            except ValueError:  # a NUL
                return False
        if right:
            with self._lock:
                self._right[key] = None
                while len(self._right) > _REMEMBERED:
                    self._right.popitem(last=False)
        return right
