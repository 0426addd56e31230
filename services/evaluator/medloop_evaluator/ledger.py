"""Which approvals a model has had, and which one is in force.

Records are the ledger; MLflow's tags and aliases follow it. The id of an approval is made of the model and a number
that counts up, and records are put once, so two replicas cannot both take the same number. An approval counts only if
its signature verifies, and if the version it names is still the bundle that was approved.
"""

import logging
from dataclasses import dataclass

from medloop.approvals import Verifier
from medloop.errors import Conflict, NotFound, UntrustedModel
from medloop.registry import CHALLENGER, CHAMPION, PREVIOUS, TAG_APPROVAL, TAG_DIGEST, Registry, State, Version
from medloop.schemas import Approval
from medloop.storage.records import RecordStore, scan
from pydantic import ValidationError

logger = logging.getLogger(__name__)

KIND = "approvals"


def approval_id(model: str, sequence: int) -> str:
    """Sorts by sequence within one model."""
    return f"{model}:{sequence:09d}"


@dataclass(frozen=True, slots=True)
class Standing:
    """`champion`: the newest approval with the version it speaks of, None when there is none or that version is gone;
    `previous`: the newest approval of another version, where a rollback goes; `sequence`: the highest number taken."""

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
        known = {approval.id: approval for approval in self.history(model)}
        # Where records were lost, the tag still knows the newest.
        if (tagged := _tagged(state)) is not None and tagged.model == model:
            known.setdefault(tagged.id, tagged)
        sequence = max((approval.sequence for approval in known.values()), default=0)
        signed = sorted(filter(self._verifies, known.values()), key=lambda approval: approval.sequence, reverse=True)
        versions = {version.version: version for version in self.registry.versions(model)}
        # A version that was deleted, or a number that now means another bundle, is not what was approved.
        pairs = [
            (approval, found)
            for approval in signed
            if (found := versions.get(approval.version)) and found.tags.get(TAG_DIGEST) == approval.bundle_digest
        ]
        champion = pairs[0] if pairs and pairs[0][0] is signed[0] else None
        others = (pair for pair in pairs if champion is None or pair[1].version != champion[1].version)
        return Standing(champion, next(others, None), sequence)

    def append(self, approval: Approval) -> None:
        """Put the approval on record; raises Conflict when its number was taken in the meantime."""
        if not self.records.put_once(KIND, approval.id, approval.model_dump(mode="json")):
            raise Conflict(
                f"Somebody else changed the champion of {approval.model} at the same moment; look at the timeline "
                "and decide again."
            )

    def settle(self, model: str) -> Standing:
        """Make MLflow's tags and aliases say what the ledger says: after an approval, after one that was cut off
        half way, and after an alias was moved by hand."""
        standing = self.standing(model)
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
