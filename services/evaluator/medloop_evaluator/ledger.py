"""Which approvals a model has had, and which one is in force.

Records are the ledger; MLflow's tags and aliases follow it. The id of an approval is made of the model and a number
that counts up, and records are put once, so two replicas cannot both take the same number. An approval counts only if
its signature verifies, and if the version it names is still the bundle that was approved.
"""

import logging
from dataclasses import dataclass
from hashlib import sha256
from uuid import UUID

from medloop.approvals import Verifier
from medloop.errors import Conflict, NotFound, UntrustedModel
from medloop.log import request_id
from medloop.registry import CHALLENGER, CHAMPION, PREVIOUS, TAG_APPROVAL, TAG_DIGEST, Registry, State, Version
from medloop.schemas import Approval
from medloop.storage.records import RecordStore, scan
from pydantic import ValidationError

logger = logging.getLogger(__name__)

KIND = "approvals"


def audit_id(approval: Approval) -> str:
    """A UUIDv7 (RFC 9562, 5.7) of the moment of approval, its other bits from the approval's id: always the same for
    one approval, so that its event is put once, and in the order of time among the others."""
    milliseconds = int(approval.created_at.timestamp() * 1000)
    rest = int.from_bytes(sha256(approval.id.encode()).digest()[:10])
    bits = (milliseconds << 80 | rest) & ~(0xF << 76) & ~(0x3 << 62) | (0x7 << 76) | (0x2 << 62)
    return str(UUID(int=bits))


def approval_id(model: str, sequence: int) -> str:
    """Sorts by sequence within one model."""
    return f"{model}:{sequence:09d}"


@dataclass(frozen=True, slots=True)
class Standing:
    """`newest`: the approval in force, None when nothing was ever approved; `champion`: the same with the version it
    speaks of, None when that version is gone or another bundle by now; `previous`: the newest approval of another
    version, where a rollback goes; `sequence`: the highest number taken."""

    newest: Approval | None
    champion: tuple[Approval, Version] | None
    previous: tuple[Approval, Version] | None
    sequence: int


class Ledger:
    def __init__(self, records: RecordStore, registry: Registry, verifier: Verifier) -> None:
        self.records = records
        self.registry = registry
        self.verifier = verifier

    def history(self, model: str) -> list[Approval]:
        """All approvals on record, newest first."""
        return [Approval.model_validate(record.document) for record in scan(self.records, KIND, {"model": model})]

    def standing(self, model: str) -> Standing:
        """Raises NotFound when the model is not registered."""
        state = self.registry.state(model)
        if state is None:
            raise NotFound(f"Model {model} is not registered in MLflow; train it first.")
        recorded = self.history(model)
        known = {approval.id: approval for approval in recorded if self._verifies(approval)}
        # Where records were lost, the tag still knows the newest; what anybody wrote into it counts for nothing.
        if (tagged := _tagged(state)) is not None and tagged.model == model and self._verifies(tagged):
            known.setdefault(tagged.id, tagged)
        sequence = max((approval.sequence for approval in (*recorded, *known.values())), default=0)
        signed = sorted(known.values(), key=lambda approval: approval.sequence, reverse=True)
        versions = {version.version: version for version in self.registry.versions(model)}
        # A version that was deleted, or a number that now means another bundle, is not what was approved.
        pairs = [
            (approval, found)
            for approval in signed
            if (found := versions.get(approval.version)) and found.tags.get(TAG_DIGEST) == approval.bundle_digest
        ]
        newest = signed[0] if signed else None
        champion = pairs[0] if pairs and pairs[0][0] is newest else None
        others = (pair for pair in pairs if newest is None or pair[1].version != newest.version)
        return Standing(newest, champion, next(others, None), sequence)

    def append(self, approval: Approval) -> None:
        """Put the approval on record; raises Conflict when its number was taken in the meantime."""
        if not self.records.put_once(KIND, approval.id, approval.model_dump(mode="json")):
            raise Conflict(
                f"Somebody else changed the champion of {approval.model} at the same moment; look at the timeline "
                "and decide again."
            )
        self._audit(approval, request_id.get())

    def settle(self, model: str) -> Standing:
        """Make the audit events and MLflow's tags and aliases say what the ledger says: after an approval, after one
        that was cut off half way, and after an alias was moved by hand."""
        standing = self.standing(model)
        if standing.newest is not None:
            # Only missing where the approval was cut off; which request that was is not known any more.
            self._audit(standing.newest, None)
        if standing.champion is None:
            return standing
        (approval, version), previous = standing.champion, standing.previous
        state = self.registry.state(model) or State({}, {})
        text = approval.model_dump_json()
        wanted = {CHAMPION: version.version} | ({PREVIOUS: previous[1].version} if previous else {})
        if version.tags.get(TAG_APPROVAL) != text:
            self.registry.set_tag(model, version.version, TAG_APPROVAL, text)
        if state.tags.get(TAG_APPROVAL) != text:
            self.registry.set_model_tag(model, TAG_APPROVAL, text)
        for alias in (PREVIOUS, CHAMPION):
            if alias in wanted and state.aliases.get(alias) != wanted[alias]:
                self.registry.set_alias(model, alias, wanted[alias])
        if state.aliases.get(CHALLENGER) == version.version:
            self.registry.delete_alias(model, CHALLENGER)
        return standing

    def _audit(self, approval: Approval, request: str | None) -> None:
        event = {
            "type": approval.action,
            "model": approval.model,
            "actor": approval.approver,
            "version": approval.version,
            "approval": approval.id,
            "reason": approval.reason,
            "request_id": request,
            "created_at": approval.created_at.isoformat(),
        }
        self.records.put_once("audit", audit_id(approval), event)

    def _verifies(self, approval: Approval) -> bool:
        try:
            self.verifier.check(
                approval, model=approval.model, version=approval.version, bundle_digest=approval.bundle_digest
            )
        except UntrustedModel as exc:
            logger.warning("an approval does not count: %s", exc.detail, extra={"approval": approval.id})
            return False
        return True


def _tagged(state: State) -> Approval | None:
    try:
        return Approval.model_validate_json(state.tags[TAG_APPROVAL])
    except KeyError:
        return None
    except ValidationError:
        logger.warning("the model's approval tag was changed by hand and is ignored")
        return None
