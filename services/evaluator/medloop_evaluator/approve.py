"""Approvals and rollbacks: the only way in which production changes."""

import threading
from typing import Literal

from medloop.approvals import Signer
from medloop.bundle import Bundle, Network
from medloop.errors import Conflict
from medloop.log import request_id
from medloop.registry import PREVIOUS, Registry, Version, fetch_bundle
from medloop.schemas import Approval, ApprovalCreate, GateDecision, RollbackCreate, TimelineEntry, new_id, now
from medloop.settings import HomeSettings
from medloop.storage.records import RecordStore

from medloop_evaluator.gate import Gate
from medloop_evaluator.ledger import Ledger, Standing, approval_id

BOOTSTRAP = "bootstrap"
"""Stands where a person's name would: nobody has looked at the first champion of a demo."""


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
        return self.gate.decide(challenger, standing.champion and standing.champion[1])

    def approve(self, request: ApprovalCreate) -> tuple[Approval, bool]:
        """The signed approval, and whether it is a new one: approving the champion again changes nothing.

        Raises Conflict when the gate failed and no `override` says why it is approved nevertheless, when `bootstrap`
        is asked for where there is a champion, or when somebody else was quicker; UntrustedModel when the bundle is
        not the one that was registered or does not give its golden answers.
        """
        with self._lock(request.model):
            version = self.registry.version(request.model, request.version)
            standing = self.ledger.settle(request.model)
            if standing.champion is not None and standing.champion[1].version == request.version:
                return standing.champion[0], False
            if request.bootstrap and standing.champion is not None:
                raise Conflict(
                    f"{request.model} has a champion (version {standing.champion[1].version}); a person must approve "
                    f"the next one: medloop approve --version {request.version}"
                )
            bundle = self._trusted(version)
            decision = self.gate.decide(version, standing.champion and standing.champion[1])
            if decision.outcome == "fail" and request.override is None:
                raise Conflict(
                    f"The gate failed: {decision.reason} To approve it nevertheless, give a reason with --override."
                )
            action: Literal["bootstrap", "approve"] = "bootstrap" if request.bootstrap else "approve"
            approver = BOOTSTRAP if request.bootstrap else request.approver
            return self._enact(action, standing, bundle, version, decision.id, approver, request.override or ""), True

    def rollback(self, request: RollbackCreate) -> Approval:
        """Bring back the champion before the present one, which becomes `previous` in turn."""
        with self._lock(request.model):
            standing = self.ledger.settle(request.model)
            if standing.previous is None:
                raise Conflict(f"{request.model} has no {PREVIOUS} champion to go back to; approve a version instead.")
            approval, version = standing.previous
            bundle = self._trusted(version)
            return self._enact(
                "rollback", standing, bundle, version, approval.decision_id, request.approver, request.reason
            )

    def timeline(self, model: str) -> list[TimelineEntry]:
        """Every change of the champion, newest first, with the decision it rests on."""
        return [
            TimelineEntry(approval=approval, decision=self.gate.read(approval.decision_id))
            for approval in self.ledger.history(model)
        ]

    def _trusted(self, version: Version) -> Bundle:
        bundle = fetch_bundle(self.registry, version, self.home.bundles_dir, fresh=True)
        Network(bundle, threads=1).check_golden()
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
        self._audit(approval)
        return approval

    def _audit(self, approval: Approval) -> None:
        event = {
            "type": approval.action,
            "model": approval.model,
            "actor": approval.approver,
            "version": approval.version,
            "approval": approval.id,
            "reason": approval.reason,
            "request_id": request_id.get(),
            "created_at": now().isoformat(),
        }
        self.records.put_once("audit", new_id(), event)

    def _lock(self, model: str) -> threading.Lock:
        # Between replicas the ledger's numbers decide; within this one nobody need be refused.
        return self._locks.setdefault(model, threading.Lock())
