"""Models: which version answers, who approved it and why; approve another one, or go back."""

import pandas as pd
import streamlit as st
from medloop.errors import MedLoopError
from medloop.registry import CHALLENGER, CHAMPION, PREVIOUS
from medloop.schemas import Approval, GateDecision, TimelineEntry

from medloop_dashboard.connections import outcome
from medloop_dashboard.runs import VersionRow
from medloop_dashboard.screens import cached
from medloop_dashboard.screens.elements import ask_name, choose_model, connections, guarded, show_error
from medloop_dashboard.wording import logged, moment, plain, short

REFRESH_SECONDS = 3.0
OUTCOMES = {
    "pass": "Passed: not significantly worse than the champion",
    "fail": "Failed: approving it needs a reason",
    "no-champion": "Nothing to compare with: there is no champion yet",
}
GATE = {"pass": "passed", "fail": "failed", "no-champion": "no champion yet"}
ACTIONS = {"approve": "Approved", "rollback": "Rolled back to", "bootstrap": "First champion (bootstrap)"}


def show() -> None:
    st.title("Models")
    st.caption("Production changes only through the gate and a named person's signed approval.")
    with guarded("The registry cannot be read"):
        model = choose_model(cached.models)
        if model is None:
            return
        rows = cached.versions(model)
        _show_done()
        _show_served(model)
        st.subheader("Versions", anchor=False)
        st.dataframe(_version_table(rows), hide_index=True, alt=f"Versions of {model}")
        approve, rollback = st.columns(2, gap="large")
        with approve, st.container(border=True):
            _show_approve(model, rows)
        with rollback, st.container(border=True):
            _show_rollback(model, rows)
        _show_timeline(model)


def _show_done() -> None:
    """What the last click did: kept over the rerun that follows it."""
    done: Approval | None = st.session_state.pop("approval", None)
    if done is not None:
        st.success(
            plain(f"Signed as number {done.sequence} by {done.approver}; inference takes it up within seconds."),
            title=plain(f"{ACTIONS[done.action]} version {done.version}"),
        )


@st.fragment(run_every=REFRESH_SECONDS)
def _show_served(model: str) -> None:
    """Asks again by itself: what was approved a moment ago is taken up within seconds."""
    st.subheader("Answering now", anchor=False)
    with guarded("Inference cannot say what it serves"):
        served = connections().inference.served_model()
        if served.model is None:
            st.warning("Inference answers nothing: no version is approved and loaded.")
        elif served.model.name != model:
            st.info(plain(f"Inference serves another model, {served.model.name} version {served.model.version}."))
        else:
            since = f", since {moment(served.loaded_at)}" if served.loaded_at else ""
            st.markdown(
                f"**{plain(model)} version {plain(served.model.version)}**"
                + plain(f", {served.model.engine} {served.model.precision}, bundle {short(served.model.bundle_digest)}")
                + plain(since)
            )
        for refused in served.refused:
            st.warning(
                plain(f"{refused.reason} (at {moment(refused.at)})"), title=plain(f"Version {refused.version} refused")
            )
        for what, reason in served.degraded.items():
            st.warning(plain(reason), title=plain(f"Degraded: {what}"))


def _version_table(rows: list[VersionRow]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "Version": [int(row.version) for row in rows],
            "Alias": [", ".join(row.aliases) for row in rows],
            "Registered": [moment(row.created_at) for row in rows],
            "Test accuracy (95 % interval)": [logged(row.metrics, "test", "accuracy") for row in rows],
            "Data set version": [short(row.dataset_id) for row in rows],
            "Run": [short(row.run_id) for row in rows],
        }
    )


def _show_approve(model: str, rows: list[VersionRow]) -> None:
    st.subheader("Approve", anchor=False)
    candidates = [row.version for row in rows if CHAMPION not in row.aliases]
    if not candidates:
        st.caption("Every version is in production already; train another one to have something to approve.")
        return
    waiting = [row.version for row in rows if CHALLENGER in row.aliases and row.version in candidates]
    version = st.selectbox(
        "Version to approve", candidates, index=candidates.index(waiting[0]) if waiting else 0, key="approve-version"
    )
    decision = _show_gate(model, str(version))
    override = None
    if decision is not None and decision.outcome == "fail":
        override = st.text_area(
            "Reason to approve although the gate failed", max_chars=2000, height=80, key=f"override-{version}"
        ).strip()
    approver = ask_name("approver")
    confirmed = st.checkbox(
        f"I have looked at the evaluation of version {plain(str(version))} and want it to answer in production",
        key=f"confirm-{version}",
    )
    ready = bool(approver) and confirmed and decision is not None and override != ""
    if not ready:
        st.caption(
            "To approve: compare with the champion first, give your name and confirm; a failed gate needs a reason."
        )
    champion = _champion(rows)
    # The champion is part of the button: a click made while another one was shown is not one on this.
    key = f"approve-{version}-over-{champion}"
    if st.button(f"Approve version {plain(str(version))}", type="primary", disabled=not ready, key=key):
        evaluator = connections().evaluator
        _act(
            "The version was not approved",
            outcome(
                lambda: evaluator.approve(model, str(version), approver=approver, override=override, champion=champion)
            ),
        )


def _show_gate(model: str, version: str) -> GateDecision | None:
    """The gate's decision on `version`, once asked for: comparing takes a while where a version was not evaluated."""
    decisions: dict[tuple[str, str], GateDecision] = st.session_state.setdefault("decisions", {})
    decision = decisions.get((model, version))
    if decision is not None:
        _show_decision(decision)
        return decision
    if st.button("Compare with the champion", key=f"gate-{version}"):
        with guarded("The gate gave no decision"):
            with st.spinner("Comparing on the frozen test split …", show_time=True):
                decisions[(model, version)] = connections().evaluator.gate(model, version)
            st.rerun()
    return None


def _show_decision(decision: GateDecision) -> None:
    draw = {"pass": st.success, "fail": st.error}.get(decision.outcome, st.info)
    draw(plain(decision.reason), title=OUTCOMES[decision.outcome])


def _show_rollback(model: str, rows: list[VersionRow]) -> None:
    st.subheader("Roll back", anchor=False)
    target = next((row.version for row in rows if PREVIOUS in row.aliases), None)
    if target is None:
        st.caption("There is no earlier champion to go back to.")
        return
    st.markdown(f"The champion before was version **{plain(target)}**. Rolling back makes it answer again.")
    approver = ask_name("rollback-approver")
    reason = st.text_area("Reason", max_chars=2000, height=80, key="rollback-reason").strip()
    confirmed = st.checkbox(f"I want version {plain(target)} to answer in production again", key=f"back-{target}")
    champion = _champion(rows)
    ready = bool(approver and reason and confirmed)
    if st.button(f"Roll back to version {plain(target)}", disabled=not ready, key=f"rollback-{champion}-to-{target}"):
        evaluator = connections().evaluator
        _act(
            "Nothing was rolled back",
            outcome(lambda: evaluator.rollback(model, approver=approver, reason=reason, champion=champion)),
        )


def _champion(rows: list[VersionRow]) -> str | None:
    return next((row.version for row in rows if CHAMPION in row.aliases), None)


def _act(failure: str, result: Approval | MedLoopError) -> None:
    if isinstance(result, MedLoopError):
        show_error(result, failure)
        return
    st.session_state["approval"] = result
    st.session_state["decisions"] = {}  # they compared with the champion of before
    cached.versions.clear()
    st.rerun()


def _show_timeline(model: str) -> None:
    st.subheader("Who changed what, when and why", anchor=False)
    with guarded("The timeline cannot be read"):
        entries = connections().evaluator.timeline(model)
        if not entries:
            st.caption("Nothing was approved yet.")
            return
        st.dataframe(_timeline_table(entries), hide_index=True, alt=f"Approvals and rollbacks of {model}")


def _timeline_table(entries: list[TimelineEntry]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Number": entry.approval.sequence,
                "When": moment(entry.approval.created_at),
                "What": f"{ACTIONS[entry.approval.action]} version {entry.approval.version}",
                "Who": entry.approval.approver,
                "Gate": GATE[entry.decision.outcome] if entry.decision else "",
                "Reason": entry.approval.reason,
                "Signed with key": entry.approval.key_id,
            }
            for entry in entries
        ]
    )
