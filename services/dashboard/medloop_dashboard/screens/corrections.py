"""Corrections: what people said against the model's answers, and what became of it."""

import pandas as pd
import streamlit as st
from medloop.errors import MedLoopError
from medloop.schemas import Correction

from medloop_dashboard.connections import outcome
from medloop_dashboard.screens import cached
from medloop_dashboard.screens.elements import connections, guarded
from medloop_dashboard.wording import moment

LIMIT = 100
_ROW_PIXELS = 72


def show() -> None:
    st.title("Corrections")
    st.caption(
        "Labels that people gave to predicted images. A pending one waits for review before it becomes training data."
    )
    status = st.segmented_control(
        "Status", ["all", "pending", "accepted", "rejected"], default="all", required=True, key="status"
    )
    with guarded("Corrections cannot be read"):
        found = connections().inference.corrections(status=None if status == "all" else status, limit=LIMIT)
        if not found:
            st.info(
                "There is no correction yet. Correct an answer on the page Predict."
                if status == "all"
                else f"No correction is {status}."
            )
            return
        pictures = [_picture(correction) for correction in found]
        st.dataframe(
            _table(found, pictures),
            hide_index=True,
            row_height=_ROW_PIXELS,
            column_config={
                "Image": st.column_config.ImageColumn(width="small"),
                "Comment": st.column_config.TextColumn(width="medium"),
            },
            alt="Corrections, newest first",
        )
        if len(found) == LIMIT:
            st.caption(f"The newest {LIMIT} are shown.")
        if None in pictures:
            st.warning("Some images cannot be shown: the object store does not have them or cannot be read from here.")


def _picture(correction: Correction) -> str | None:
    shown = outcome(lambda: cached.stored_thumbnail(correction.image_hash))
    return None if isinstance(shown, MedLoopError) else shown


def _table(found: list[Correction], pictures: list[str | None]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Image": picture,
                "Status": correction.status,
                "Predicted": correction.predicted_label or "unknown",
                "Corrected to": correction.label,
                "Author": correction.author,
                "Comment": correction.comment,
                "When": moment(correction.created_at),
                "Model": f"{correction.model} version {correction.version}" if correction.model else "unknown",
                "Id": correction.id,
            }
            for correction, picture in zip(found, pictures, strict=True)
        ]
    )
