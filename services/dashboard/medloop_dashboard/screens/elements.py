"""Pieces that several pages draw."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import streamlit as st
from medloop.errors import MedLoopError

from medloop_dashboard.connections import Connections, person
from medloop_dashboard.wording import plain


@st.cache_resource(show_spinner=False, on_release=Connections.close)
def connections() -> Connections:
    """One set of clients for all sessions; they may be used from several threads."""
    return Connections.open()


def show_error(error: MedLoopError, what: str) -> None:
    """What could not be done, and the service's own sentence on why and what to do."""
    st.error(plain(error.detail), title=plain(what))


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Show an error of ours in place of what it kept from being drawn; the rest of the page goes on."""
    try:
        yield
    except MedLoopError as error:
        show_error(error, what)


def ask_name(key: str, value: str = "") -> str:
    """In whose name something is done. Whom the proxy in front signed in is not asked: services take no other name."""
    if (known := person()) is not None:
        # A key of its own for each person, since what a key holds goes before what is given here.
        st.text_input("Your name", known, disabled=True, key=f"{key}-{known}", help="As whom you are signed in.")
        return known  # and not what a browser says is in the field
    return st.text_input("Your name", value, max_chars=200, key=key).strip()


def choose_model(registered: Callable[[], Sequence[str]]) -> str | None:
    """A box to choose the registered model; None, with words on what to do, when there is none."""
    names = list(registered())
    if not names:
        st.info("No model is registered yet. Train one with `medloop train` or `medloop demo`.")
        return None
    preferred = connections().model
    index = names.index(preferred) if preferred in names else 0
    chosen = st.selectbox("Model", names, index=index, key="model", bind="query-params", width=360)
    return str(chosen) if chosen is not None else None
