"""The page that Streamlit runs: navigation, and the notice that stands under every page."""

from pathlib import Path

import streamlit as st
from medloop.errors import MedLoopError

from medloop_dashboard.connections import person
from medloop_dashboard.screens import corrections, models, predict, runs
from medloop_dashboard.screens.elements import show_error
from medloop_dashboard.wording import NOT_A_DEVICE

LOGO = Path(__file__).with_name("logo.svg")


def main() -> None:
    st.set_page_config(page_title="MedLoop", layout="wide")
    st.logo(LOGO, size="large")
    try:
        person()
    except MedLoopError as error:
        show_error(error, "You cannot be let in")
        st.stop()
    page = st.navigation(
        [
            st.Page(predict.show, title="Predict", url_path="predict", default=True),
            st.Page(runs.show, title="Runs", url_path="runs"),
            st.Page(models.show, title="Models", url_path="models"),
            st.Page(corrections.show, title="Corrections", url_path="corrections"),
        ],
        position="top",
    )
    page.run()
    st.divider()
    st.caption(NOT_A_DEVICE)


main()
