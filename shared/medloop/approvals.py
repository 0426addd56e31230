"""Signed approvals: Ed25519 (RFC 8032) over the canonical JSON of everything in the document but the signature.

The evaluator holds the private key and signs; inference holds only public keys and serves a champion whose approval
verifies, so moving an alias by hand changes nothing.
"""

import base64
import hashlib
import json
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from medloop.errors import StorageUnavailable, UntrustedModel
from medloop.schemas import Approval

PRIVATE_KEY_FILE = "approval.key"
PUBLIC_KEY_FILE = "approval.pub"


def _signed_bytes(approval: Approval) -> bytes:
    document = approval.model_dump(mode="json", exclude={"signature"})
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(_raw(key)).hexdigest()[:16]


class Signer:
    """Signs approvals with one private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.key_id = key_id(key.public_key())

    @property
    def public_key(self) -> Ed25519PublicKey:
        return self._key.public_key()

    @classmethod
    def open(cls, folder: Path) -> "Signer":
        """The key under `folder`; made, readable by its owner only, when there is none yet."""
        path = folder / PRIVATE_KEY_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not path.exists():
                _create(path, Ed25519PrivateKey.generate())
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError) as exc:
            raise StorageUnavailable(f"The signing key {path.name} cannot be read or made: {exc}.") from exc
        if not isinstance(key, Ed25519PrivateKey):
            raise StorageUnavailable(f"The signing key {path.name} is not an Ed25519 key; replace it.")
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        public_path = folder / PUBLIC_KEY_FILE
        if not public_path.exists() or public_path.read_bytes() != public:
            public_path.write_bytes(public)
        return cls(key)

    def sign(self, approval: Approval) -> Approval:
        """The same approval with this key's id and signature."""
        unsigned = approval.model_copy(update={"key_id": self.key_id, "signature": ""})
        signature = base64.b64encode(self._key.sign(_signed_bytes(unsigned))).decode()
        return unsigned.model_copy(update={"signature": signature})


class Verifier:
    """Checks approvals against the public keys that are trusted here."""

    def __init__(self, keys: list[Ed25519PublicKey]) -> None:
        self._keys = {key_id(key): key for key in keys}

    @classmethod
    def open(cls, folder: Path) -> "Verifier":
        """Trust every `*.pub` in `folder` (PEM, Ed25519); none there means that nothing verifies."""
        keys: list[Ed25519PublicKey] = []
        for path in sorted(folder.glob("*.pub")):
            try:
                key = load_pem_public_key(path.read_bytes())
            except (OSError, ValueError) as exc:
                raise StorageUnavailable(f"The public key {path.name} cannot be read: {exc}.") from exc
            if isinstance(key, Ed25519PublicKey):
                keys.append(key)
        return cls(keys)

    def check(self, approval: Approval, *, model: str, version: str, bundle_digest: str) -> None:
        """Raise UntrustedModel unless `approval` is validly signed and speaks of exactly this version and bundle."""
        key = self._keys.get(approval.key_id)
        if key is None:
            raise UntrustedModel(f"The approval is signed with key {approval.key_id}, which is not trusted here.")
        try:
            key.verify(base64.b64decode(approval.signature, validate=True), _signed_bytes(approval))
        except (InvalidSignature, ValueError) as exc:
            raise UntrustedModel("The approval's signature does not verify: it was changed after signing.") from exc
        if (approval.model, approval.version) != (model, version):
            raise UntrustedModel(
                f"The approval is for {approval.model} version {approval.version}, not {model} version {version}."
            )
        if approval.bundle_digest != bundle_digest:
            raise UntrustedModel("The approval is for another bundle than the one registered under this version.")


def _create(path: Path, key: Ed25519PrivateKey) -> None:
    # Written under another name first and linked: two starting at once agree on one key.
    temporary = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    finally:
        temporary.unlink()
