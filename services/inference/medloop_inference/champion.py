"""Which model answers: the champion of one registered model, followed in MLflow and served only with a valid approval.

What is served changes by swapping one reference, so a request that has begun ends on the model it began with. A
champion that fails any check is refused, with the reason kept for people, and the one before goes on answering. The
one that answered before the present one stays in memory, so that a rollback to it needs a valid approval and nothing
else: no download, no load.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

from medloop.approvals import Verifier
from medloop.bundle import Bundle
from medloop.engines import Network
from medloop.errors import MedLoopError, NoModel, StorageFull, StorageUnavailable, TrackingUnavailable, UntrustedModel
from medloop.outliers import OutlierModel
from medloop.registry import CHAMPION, TAG_APPROVAL, BundleCache, Registry, State
from medloop.schemas import Approval, EngineCheck, ModelRef, RefusedVersion, ServedModel, now
from medloop.settings import HomeSettings
from pydantic import ValidationError

from medloop_inference.answer import Composer
from medloop_inference.last_served import LastServed
from medloop_inference.loading import Wanted, open_wanted, reference

logger = logging.getLogger(__name__)

RECHECK_SECONDS = 60.0
"""A refused champion is looked at again after this time, or as soon as its alias, its approval or our keys change: a
download is too dear for every poll, and an artifact store may have been repaired."""
TOUCH_SECONDS = 3600.0
"""Between two notes on this disk that the bundles in memory are in use."""
_REMEMBERED_REFUSALS = 10
_REFERENCE = Wanted()


@dataclass(frozen=True, slots=True)
class Served:
    """A model that may answer: verified, approved, and warm. `doubt` says why it does not answer with the engine or in
    the precision that was asked for."""

    ref: ModelRef
    bundle: Bundle
    network: Network
    approval: Approval
    loaded_at: datetime
    composer: Composer
    checks: tuple[EngineCheck, ...] = ()
    doubt: str | None = None


class _Held(NamedTuple):
    """The models in memory: the one that answers, and the one that did before."""

    current: Served | None = None
    previous: Served | None = None


class Watcher:
    """Follows the champion of `model`.

    `poll_once` is called from one background thread; everything else may be called from any, and never waits.
    `report` is told, after a start from disk and after every poll, why nothing can answer, or None when something can.

    At most two networks are in memory: the previous one goes when a third is about to be loaded, whatever becomes of
    that one. A rollback then takes the bundle from this machine's disk.
    """

    def __init__(
        self,
        model: str,
        registry: Registry,
        home: HomeSettings,
        *,
        wanted: Wanted = _REFERENCE,
        report: Callable[[str | None], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self._registry = registry
        self._trusted = home.trusted_dir
        self._bundles = BundleCache(home.bundles_dir)
        self._last_served = LastServed(home.home / "inference" / model / "last_served.json")
        self._wanted, self._report, self._clock = wanted, report, clock
        self._polling = threading.Lock()
        self._restored = False
        self._held = _Held()
        self._refused: tuple[RefusedVersion, ...] = ()  # newest first
        self._degraded: dict[str, str] = {}
        self._floor = 0  # the highest sequence of an approval that was ever accepted here
        self._unkept: Approval | None = None  # accepted, but not on this machine's disk yet
        self._champion_refused = False
        self._looked_at = clock()
        self._examined: tuple[object, ...] = ()
        self._examine_again = 0.0
        self._open_again = 0.0
        self._touch_again = 0.0

    @property
    def current(self) -> Served | None:
        return self._held.current

    @property
    def champion_refused(self) -> bool:
        """Whether the version that the champion alias points at now is refused."""
        return self._champion_refused

    @property
    def tracking_age(self) -> float:
        """Seconds since MLflow last answered; since the start if it never did."""
        return self._clock() - self._looked_at

    @property
    def degraded(self) -> dict[str, str]:
        return dict(self._degraded)

    def served(self) -> Served:
        """What answers now; raises NoModel."""
        current = self.current
        if current is None:
            raise NoModel(
                f"Nothing answers for model {self.model}: {self.unready_reason}. "
                "Train a version, then approve it with medloop approve."
            )
        return current

    @property
    def unready_reason(self) -> str | None:
        if self.current is not None:
            return None
        if self._refused:
            newest = self._refused[0]
            return f"no approved champion yet (version {newest.version} was refused: {newest.reason.rstrip('.')})"
        why = [self._degraded[name].rstrip(".") for name in ("start", "tracking") if name in self._degraded]
        return f"no approved champion yet ({'; '.join(why)})" if why else "no approved champion yet"

    def describe(self) -> ServedModel:
        current, previous = self._held
        refused = list(self._refused)
        if current is None:
            return ServedModel(model=None, refused=refused, degraded=self.degraded)
        return ServedModel(
            model=current.ref,
            classes=list(current.bundle.card.classes),
            preparation=current.bundle.card.preparation.model_dump(mode="json"),
            loaded_at=current.loaded_at,
            previous=previous.ref if previous else None,
            checks=list(current.checks),
            refused=refused,
            degraded=self.degraded,
        )

    def poll_once(self) -> None:
        """Look at the registry once and follow it; the first time, start from this machine's disk."""
        with self._polling:
            if not self._restored:
                self._restored = True
                self._restore()
                self._report(self.unready_reason)  # asking MLflow may take long
            if self._unkept is not None:
                self._keep(self._unkept)
            try:
                state = self._registry.state(self.model)
            except TrackingUnavailable as exc:
                self._degrade("tracking", exc.detail)
            else:
                self._looked_at = self._clock()
                self._degrade("tracking", None)
                self._follow(state)
            self._open_anew()
            self._note_use()
            self._report(self.unready_reason)

    def _restore(self) -> None:
        """Serve what was served last, checked as thoroughly as if it came from MLflow."""
        try:
            approval = self._last_served.read()
            if approval is None:
                return
            self._verify(approval, approval.version)
            self._floor = approval.sequence
            bundle = self._bundles.find(approval.bundle_digest)
            if bundle is None:
                raise UntrustedModel(f"The bundle of version {approval.version} is missing or damaged here.")
            self._swap(load(bundle, approval, self._wanted))
        except MedLoopError as exc:
            self._degrade("start", f"What was served last cannot be served from this disk: {exc.detail}")

    def _follow(self, state: State | None) -> None:
        version = state.aliases.get(CHAMPION) if state else None
        current = self.current
        if state is None or version is None:
            gone = f"The champion alias is gone from MLflow; version {current.ref.version} stays." if current else None
            self._degrade("champion", gone)
            self._champion_refused = False
            self._examined = ()
            return
        approval = state.tags.get(TAG_APPROVAL)
        examined = (version, approval, self._keys())
        if examined == self._examined and self._clock() < self._examine_again:
            return
        doubt, refused, self._examine_again = None, False, math.inf
        try:
            self._serve(version, approval)
        except MedLoopError as exc:
            self._examine_again = self._clock() + (0.0 if isinstance(exc, TrackingUnavailable) else RECHECK_SECONDS)
            if current is not None and version == current.ref.version:
                # What answers was approved, and stays. The evaluator writes an approval first and moves the alias
                # then: this may be between the two.
                doubt = exc.detail
            else:
                refused = True
                self._refuse(version, exc.detail)
        self._champion_refused = refused
        self._degrade("champion", doubt)
        self._examined = examined

    def _serve(self, version: str, tag: str | None) -> None:
        approval = _approval_in_force(tag, version)
        self._verify(approval, version)
        if approval.sequence < self._floor:
            raise UntrustedModel(
                f"The approval in force (number {approval.sequence}) is older than one that was accepted here "
                f"(number {self._floor}); approve version {version} anew with medloop approve."
            )
        if self.current is not None and self.current.approval == approval:
            self._forget(version)
            return
        served = self._in_memory(approval)
        if served is None:
            digest = approval.bundle_digest
            bundle = self._bundles.find(digest) or self._fetch(version, digest)
            self._held = self._held._replace(previous=None)
            served = load(bundle, approval, self._wanted)
        self._floor = approval.sequence
        self._keep(approval)
        self._swap(served)

    def _keep(self, approval: Approval) -> None:
        """Have this machine's disk know the approval, so that a restart begins with it, and notices an older one.

        Where the disk does not take it, it is tried again at each poll: a full disk must not stand in the way of a
        rollback, and this process knows which approvals are old.
        """
        try:
            self._last_served.write(approval)
        except (StorageFull, StorageUnavailable) as exc:
            self._unkept = approval
            self._degrade("disk", f"A restart would not know the approval of version {approval.version}: {exc.detail}")
        else:
            self._unkept = None
            self._degrade("disk", None)

    def _in_memory(self, approval: Approval) -> Served | None:
        for held in self._held:
            if held and (held.ref.version, held.bundle.digest) == (approval.version, approval.bundle_digest):
                return replace(held, approval=approval)
        return None

    def _open_anew(self) -> None:
        """Change to the engine that is wanted, once the evaluator has checked it with what answers."""
        current = self.current
        if current is None or current.doubt is None or self._clock() < self._open_again:
            return
        self._open_again = self._clock() + RECHECK_SECONDS
        try:
            if self._wanted.find_check(current.ref.version, current.bundle.digest) is None:
                return
            self._held = self._held._replace(previous=None)
            served = load(current.bundle, current.approval, self._wanted)
        except MedLoopError as exc:
            logger.warning("version %s cannot be opened anew: %s", current.ref.version, exc.detail)
            return
        self._swap(served)
        if served.doubt is not None:
            self._open_again = math.inf  # it was checked, and failed here all the same

    def _note_use(self) -> None:
        """Keep the bundles in memory on this disk, too, while others that nobody uses go from it."""
        if self._clock() < self._touch_again:
            return
        self._touch_again = self._clock() + TOUCH_SECONDS
        self._bundles.touch(held.bundle.digest for held in self._held if held)
        try:
            self._bundles.evict()
        except MedLoopError as exc:
            logger.warning("bundles that nobody uses cannot be removed: %s", exc.detail)

    def _fetch(self, version: str, digest: str) -> Bundle:
        return self._bundles.fetch(self._registry, self._registry.version(self.model, version), digest)

    def _verify(self, approval: Approval, version: str) -> None:
        # Keys are read anew each time: the evaluator may have made its own after we started.
        verifier = Verifier.open(self._trusted)
        verifier.check(approval, model=self.model, version=version, bundle_digest=approval.bundle_digest)

    def _keys(self) -> tuple[tuple[str, int], ...]:
        return tuple((path.name, path.stat().st_mtime_ns) for path in sorted(self._trusted.glob("*.pub")))

    def _swap(self, served: Served) -> None:
        current, previous = self._held
        is_other = current is not None and current.ref.version != served.ref.version
        self._held = _Held(served, current if is_other else previous)
        self._open_again = self._clock() + RECHECK_SECONDS
        self._degrade("engine", served.doubt)
        self._degrade("start", None)
        self._forget(served.ref.version)
        logger.info("version %s answers now", served.ref.version, extra={"model": self.model, **_facts(served)})

    def _refuse(self, version: str, reason: str) -> None:
        known = [refused for refused in self._refused if (refused.version, refused.reason) == (version, reason)]
        if not known:
            logger.error("version %s is refused: %s", version, reason, extra={"model": self.model})
            known = [RefusedVersion(version=version, reason=reason)]
        self._forget(version)
        self._refused = (*known, *self._refused)[:_REMEMBERED_REFUSALS]

    def _forget(self, version: str) -> None:
        self._refused = tuple(refused for refused in self._refused if refused.version != version)

    def _degrade(self, name: str, detail: str | None) -> None:
        others = {key: value for key, value in self._degraded.items() if key != name}
        if detail and name not in self._degraded:
            logger.warning("degraded: %s", detail)
        self._degraded = others | ({name: detail} if detail else {})


def load(bundle: Bundle, approval: Approval, wanted: Wanted = _REFERENCE) -> Served:
    """Make a verified bundle ready to answer. Raises UntrustedModel as `open_wanted` and `OutlierModel.load` do."""
    outliers = OutlierModel.load(bundle)
    opened = open_wanted(bundle, approval.version, wanted)
    ref = reference(approval.model, approval.version, opened.network)
    composer = Composer(ref, bundle, outliers)
    return Served(ref, bundle, opened.network, approval, now(), composer, opened.checks, opened.doubt)


def _approval_in_force(tag: str | None, version: str) -> Approval:
    if tag is None:
        raise UntrustedModel(
            f"The champion alias points at version {version}, which nobody approved; approve it with medloop approve."
        )
    try:
        approval = Approval.model_validate_json(tag)
    except ValidationError as exc:
        raise UntrustedModel("The approval in MLflow cannot be read; approve the version anew.") from exc
    if approval.version != version:
        raise UntrustedModel(
            f"The champion alias points at version {version}, but the approval in force is for version "
            f"{approval.version}; approve it with medloop approve."
        )
    return approval


def _facts(served: Served) -> dict[str, str]:
    return {"version": served.ref.version, "bundle_digest": served.ref.bundle_digest, "approval": served.approval.id}
