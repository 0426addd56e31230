"""Whom a load balancer signed in, from a header that it signs.

AWS's Application Load Balancer puts what the identity provider says about a person into `x-amzn-oidc-data`: a signature
in compact form (JWS, RFC 7515) by ES256, but with base64's padding, which is signed too, so that libraries refuse it
which keep to the standard. Public keys lie under their ids at one address for a region, and the load balancers of all
customers there sign with them: whose it was is as much to be checked as the signature. It says that, and when it
expires, in the token's header.
"""

import json
import logging
import re
import threading
import time
from base64 import urlsafe_b64decode
from collections import OrderedDict
from typing import Any, TypeVar

import httpx
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from medloop.auth.principal import NoSigningKeys
from medloop.errors import Unauthenticated

logger = logging.getLogger(__name__)

Kept = TypeVar("Kept")

LEEWAY_SECONDS = 30
"""By how much clocks may differ."""
RETRY_SECONDS = 10.0
"""Between two attempts to read a key that could not be read."""
FETCH_SECONDS = 5.0
CACHED_KEYS = 64  # and as many ids of those that could not be read
_MAX_TOKEN = 32 * 2**10
_PART = r"([A-Za-z0-9_-]+)={0,2}"
_TOKEN = re.compile(rf"({_PART}\.{_PART})\.{_PART}")
_KEY_ID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


class SignedHeader:
    """Checks the header of one load balancer. May be used from several threads.

    `keys_url` is the address below which public keys lie (PEM), `signer` the load balancer's ARN. `client` and `issuer`
    are compared where they are given: what the load balancer is to the identity provider, and that one's name.
    """

    def __init__(
        self, keys_url: str, signer: str, client: str | None = None, issuer: str | None = None, name_claim: str = "sub"
    ) -> None:
        self.keys_url = keys_url.rstrip("/")
        self.name_claim = name_claim
        named = {"alg": "ES256", "signer": signer, "client": client, "iss": issuer}
        self._expected = {field: value for field, value in named.items() if value is not None}
        self._keys: OrderedDict[str, EllipticCurvePublicKey] = OrderedDict()
        self._failed: OrderedDict[str, float] = OrderedDict()
        """Until when what could not be read is not asked for again, `time.monotonic()`."""
        self._lock = threading.Lock()

    def check(self, token: str) -> str:
        """The name of the person whom `token`, the header's value, is about.

        Raises Unauthenticated for one that is not good, NoSigningKeys where its key cannot be read.
        """
        parts = _TOKEN.fullmatch(token) if len(token) <= _MAX_TOKEN else None
        if parts is None:
            raise _refused("it is no signed token" if token else "it is missing")
        signed, head, body, signature = parts.groups()
        header = _object(head)
        for field, value in self._expected.items():
            if header.get(field) != value:
                raise _refused(f"it has another {field} than it must have")
        expires = header.get("exp")
        if not isinstance(expires, int | float) or not time.time() < expires + LEEWAY_SECONDS:
            raise _refused("it has expired, or does not say when it will")
        _verify(self._key(header.get("kid")), _decoded(signature), signed.encode())
        name = _object(body).get(self.name_claim)
        if not isinstance(name, str) or not 0 < len(name.strip()) <= 200 or not name.isprintable():
            raise _refused(f"it has no {self.name_claim} that could be a name")
        return name.strip()

    def _key(self, key_id: object) -> EllipticCurvePublicKey:
        # It goes into an address, and whoever made the token up chose it.
        if not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
            raise _refused("it names no key")
        if (known := self._keys.get(key_id)) is not None:
            return known
        key = self._fetch(key_id)  # without the lock: nobody waits for a key that only another's token names
        self._keep(self._keys, key_id, key)
        return key

    def _keep(self, kept: "OrderedDict[str, Kept]", key_id: str, what: Kept) -> None:
        with self._lock:
            kept[key_id] = what
            kept.move_to_end(key_id)
            if len(kept) > CACHED_KEYS:
                kept.popitem(last=False)

    def _fetch(self, key_id: str) -> EllipticCurvePublicKey:
        refusal = NoSigningKeys(
            f"Nobody new can be let in: the load balancer's key cannot be read below {self.keys_url}. Try again soon."
        )
        if time.monotonic() < self._failed.get(key_id, 0.0):
            raise refusal
        try:
            response = httpx.get(f"{self.keys_url}/{key_id}", timeout=FETCH_SECONDS)
            response.raise_for_status()
            key = load_pem_public_key(response.content)
            if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
                raise ValueError("it is no key of the curve P-256")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, UnsupportedAlgorithm) as exc:
            logger.warning("the load balancer's key %s cannot be read: %s", key_id, type(exc).__name__)
            self._keep(self._failed, key_id, time.monotonic() + RETRY_SECONDS)
            raise refusal from exc
        return key


def _verify(key: EllipticCurvePublicKey, signature: bytes, signed: bytes) -> None:
    if len(signature) != 64:
        raise _refused("its signature is not one of ES256")
    r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
    try:
        key.verify(encode_dss_signature(r, s), signed, ECDSA(SHA256()))
    except InvalidSignature as exc:
        raise _refused("its signature is wrong") from exc


def _decoded(part: str) -> bytes:
    try:
        return urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except ValueError as exc:
        raise _refused("it is no signed token") from exc


def _object(part: str) -> dict[str, Any]:
    try:
        document = json.loads(_decoded(part))
    except (ValueError, RecursionError) as exc:
        raise _refused("it is no signed token") from exc
    if not isinstance(document, dict):
        raise _refused("it is no signed token")
    return document


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated(f"What should say who you are cannot be believed: {why}. Reload the page to sign in again.")
