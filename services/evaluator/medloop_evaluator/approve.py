"""Approvals and rollbacks: the only way in which production changes."""

import threading
from typing import Literal
from uuid import NAMESPACE_URL, uuid5

from medloop.approvals import Signer
from medloop.bundle import Bundle
from medloop.engines import open_network
from medloop.errors import Conflict
from medloop.registry import PREVIOUS, TAG_DATASET, TAG_DIGEST, Registry, Version, fetch_bundle
from medloop.schemas import Approval, ApprovalCreate, GateDecision, RollbackCreate, TimelineEntry
from medloop.settings import HomeSettings
from medloop.storage.records import RecordStore

from medloop_evaluator.gate import KIND as DECISIONS
from medloop_evaluator.gate import Gate
from medloop_evaluator.ledger import Ledger, Standing, approval_id

BOOTSTRAP = "bootstrap"
"""Stands where a person's name would: nobody has looked at the first champion of a demo."""
_DONE = {"approve": "approved", "rollback": "rolled back to", "bootstrap": "approved"}


class Approver:
    """Signs what a named person decided, after checking what it speaks of."""

    def __init__(
        self, registry: Registry, records: RecordStore, gate: Gate, ledger: Ledger, signer: Signer, home: HomeSettings
    ) -> None:
        self.registry = registry
        self.records = records
        self.gate = gate
        self.ledger = ledger
        self.signer = signer
        self.home = home
        self._locks: dict[str, threading.Lock] = {}

    def decide(self, model: str, version: str) -> GateDecision:
        """The gate's decision on `version`; for the champion itself, the one it was approved under."""
        challenger = self.registry.version(model, version)
        standing = self.ledger.standing(model)
        if standing.champion is not None and standing.champion[1].version == version:
            if (known := self.gate.read(standing.champion[0].decision_id)) is not None:
                return known
            raise Conflict(f"Version {version} is the champion of {model}; there is no other to compare it with.")
        return self._decision(challenger, standing)

    def approve(self, request: ApprovalCreate) -> tuple[Approval, bool]:
        """The signed approval, and whether it is a new one: approving the champion again changes nothing.

        Raises Conflict when the gate failed or the champion is gone and no `override` says why it is approved
        nevertheless, when `bootstrap` is asked for where something was approved before, when the champion is not the
        one that the person saw, or when somebody else was quicker; UntrustedModel when the bundle is not the one that
        was registered or does not give its golden answers.
        """
        with self._lock(request.model):
            version = self.registry.version(request.model, request.version)
            standing = self.ledger.settle(request.model)
            if standing.champion is not None and standing.champion[1].version == request.version:
                return standing.champion[0], False
            if request.bootstrap and standing.newest is not None:
                raise Conflict(
                    f"{request.model} has a champion (version {standing.newest.version}); a person must approve "
                    f"the next one: medloop approve {request.model} {request.version}"
                )
            _check_seen(request.champion, standing)
            bundle = self._trusted(version)
            decision = self._decision(version, standing)
            if decision.outcome == "fail" and request.override is None:
                raise Conflict(
                    f"The gate failed: {decision.reason} To approve it nevertheless, give a reason with --override."
                )
            action: Literal["bootstrap", "approve"] = "bootstrap" if request.bootstrap else "approve"
            approver = BOOTSTRAP if request.bootstrap else request.approver
            return self._enact(action, standing, bundle, version, decision.id, approver, request.override or ""), True

    def rollback(self, request: RollbackCreate) -> tuple[Approval, bool]:
        """Bring back the champion before the present one, which becomes `previous` in turn. Gives the approval and
        whether it is a new one: leaving a champion that was rolled back already changes nothing.

        Raises Conflict when there is none to go back to, or the champion is not the one that the person saw.
        """
        with self._lock(request.model):
            standing = self.ledger.settle(request.model)
            if _rolled_back(request.champion, standing) and standing.newest is not None:
                return standing.newest, False
            _check_seen(request.champion, standing)
            if standing.previous is None:
                raise Conflict(f"{request.model} has no {PREVIOUS} champion to go back to; approve a version instead.")
            approval, version = standing.previous
            bundle = self._trusted(version)
            decision, person, reason = approval.decision_id, request.approver, request.reason
            return self._enact("rollback", standing, bundle, version, decision, person, reason), True

    def timeline(self, model: str) -> list[TimelineEntry]:
        """Every change of the champion, newest first, with the decision it rests on."""
        return [
            TimelineEntry(approval=approval, decision=self.gate.read(approval.decision_id))
            for approval in self.ledger.history(model)
        ]

    def _decision(self, challenger: Version, standing: Standing) -> GateDecision:
        """The gate's decision; a failed one where the champion is gone, for a gate that would be off otherwise."""
        if standing.newest is None or standing.champion is not None:
            return self.gate.decide(challenger, standing.champion and standing.champion[1])
        decision = _incomparable(challenger, standing.newest)
        self.records.put_once(DECISIONS, decision.id, decision.model_dump(mode="json"))
        return self.gate.read(decision.id) or decision

    def _trusted(self, version: Version) -> Bundle:
        bundle = fetch_bundle(self.registry, version, self.home.bundles_dir, fresh=True)
        open_network(bundle).check_golden()
        return bundle

    def _enact(
        self,
        action: Literal["approve", "rollback", "bootstrap"],
        standing: Standing,
        bundle: Bundle,
        version: Version,
        decision_id: str,
        approver: str,
        reason: str,
    ) -> Approval:
        sequence = standing.sequence + 1
        approval = self.signer.sign(
            Approval(
                id=approval_id(version.model, sequence),
                sequence=sequence,
                action=action,
                model=version.model,
                version=version.version,
                bundle_digest=bundle.digest,
                decision_id=decision_id,
                approver=approver,
                reason=reason,
                key_id=self.signer.key_id,
            )
        )
        # The record first: if what follows is cut off, the next call settles it.
        self.ledger.append(approval)
        self.ledger.settle(version.model)
        return approval

    def _lock(self, model: str) -> threading.Lock:
        # Between replicas the ledger's numbers decide; within this one nobody need be refused.
        return self._locks.setdefault(model, threading.Lock())


def _rolled_back(seen: str | None, standing: Standing) -> bool:
    """Whether the newest approval is the rollback from the champion that was seen."""
    newest, left = standing.newest, standing.previous
    return newest is not None and newest.action == "rollback" and left is not None and left[1].version == seen


def _check_seen(seen: str | None, standing: Standing) -> None:
    newest = standing.newest
    if seen is not None and newest is not None and newest.version != seen:
        raise Conflict(
            f"The champion of {newest.model} is version {newest.version}, not {seen}: {newest.approver} "
            f"{_DONE[newest.action]} version {newest.version} on {newest.created_at:%Y-%m-%d at %H:%M} UTC. Look at "
            "the timeline and decide again."
        )


def _incomparable(challenger: Version, approved: Approval) -> GateDecision:
    digest = challenger.tags.get(TAG_DIGEST, "unnamed")
    return GateDecision(
        id=str(uuid5(NAMESPACE_URL, f"urn:medloop:gate:{digest}:gone:{approved.id}")),
        model=challenger.model,
        challenger=challenger.version,
        champion=approved.version,
        dataset_id=challenger.tags.get(TAG_DATASET, ""),
        outcome="fail",
        reason=f"The champion, version {approved.version}, is not in MLflow as it was approved, so that version "
        f"{challenger.version} cannot be compared with it; restore it, or roll back to the one before.",
    )
