"""Runs: the versions of a model, and everything that is known about the run that made one."""

import pandas as pd
import streamlit as st

from medloop_dashboard.runs import VersionRow
from medloop_dashboard.screens import cached, run_tabs
from medloop_dashboard.screens.elements import choose_model, guarded
from medloop_dashboard.wording import logged, moment, plain, short

_COLUMNS = {"accuracy": "Test accuracy (95 % interval)", "auc": "Test AUC", "ece": "Test calibration error"}


def show() -> None:
    st.title("Runs")
    st.caption("Every registered version, and how the run that made it went.")
    with guarded("MLflow cannot be read"):
        model = choose_model(cached.models)
        if model is None:
            return
        rows = cached.versions(model)
        if not rows:
            st.info("This model has no version yet. Train one with `medloop train`.")
            return
        st.dataframe(_table(rows), hide_index=True, alt=f"Versions of {model} with their main metrics")
        row = _choose(rows)
        if not row.run_id:
            st.warning("The run of this version was deleted in MLflow; only the registered bundle is left.")
            return
        _show_tabs(model, row)


def _table(rows: list[VersionRow]) -> pd.DataFrame:
    table = {
        "Version": [int(row.version) for row in rows],
        "Alias": [", ".join(row.aliases) for row in rows],
        "Registered": [moment(row.created_at) for row in rows],
    }
    for name, title in _COLUMNS.items():
        table[title] = [logged(row.metrics, "test", name) for row in rows]
    table["Data set version"] = [short(row.dataset_id) for row in rows]
    table["Run"] = [short(row.run_id) for row in rows]
    return pd.DataFrame(table)


def _choose(rows: list[VersionRow]) -> VersionRow:
    by_version = {row.version: row for row in rows}
    # The address of the page names the choice, so that it can be passed on: …/runs?model=phantoms&version=2
    version = st.selectbox("Run of version", list(by_version), key="version", bind="query-params", width=360)
    return by_version[version]


def _show_tabs(model: str, row: VersionRow) -> None:
    drawn = {
        "Metrics": run_tabs.metrics,
        "Artifacts": run_tabs.artifacts,
        "Evaluation": run_tabs.evaluation,
        "Explanations": run_tabs.explanations,
        "Visualizations": run_tabs.visualizations,
    }
    # Only the tab that is open is computed and read from MLflow.
    tabs = st.tabs(list(drawn), key="run_tabs", on_change="rerun")
    for tab, (name, draw) in zip(tabs, drawn.items(), strict=True):
        if tab.open:
            with tab, guarded(f"{name} of version {plain(row.version)} cannot be shown"):
                draw(model, row)
