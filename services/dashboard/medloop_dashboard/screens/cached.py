"""Reads that pages repeat on every click, kept for a few seconds for all sessions. Errors are never kept."""

import streamlit as st
from medloop.bundle import CARD, REFERENCE
from medloop.registry import BUNDLE_PATH

from medloop_dashboard import runs
from medloop_dashboard.datasets import DatasetFacts, read_facts
from medloop_dashboard.pictures import thumbnail
from medloop_dashboard.projection import Projection, project
from medloop_dashboard.screens.elements import connections

_SECONDS = 10
_FILE_SECONDS = 60
_FILES = 200  # kept in memory at once; previews are at most a few MiB
_DATASETS = 20


@st.cache_data(ttl=_SECONDS, show_spinner=False)
def models() -> list[str]:
    return connections().registry.models()


@st.cache_data(ttl=_SECONDS, show_spinner=False)
def versions(model: str) -> list[runs.VersionRow]:
    return runs.version_rows(connections().registry, model)


@st.cache_data(ttl=_SECONDS, show_spinner=False)
def detail(run_id: str) -> runs.RunDetail:
    return runs.run_detail(connections().registry, run_id)


@st.cache_data(ttl=_SECONDS, show_spinner=False)
def files(run_id: str) -> list[runs.ArtifactFile]:
    return runs.artifact_files(connections().registry, run_id)


@st.cache_data(ttl=_FILE_SECONDS, max_entries=_FILES, show_spinner=False)
def artifact(run_id: str, path: str) -> bytes:
    return runs.read_artifact(connections().registry, run_id, path)


@st.cache_data(max_entries=_FILES, show_spinner=False)
def stored_thumbnail(image_hash: str) -> str:
    """A stored image as an address for a table cell; what lies under a hash never changes."""
    return thumbnail(connections().objects.get(f"images/{image_hash[:2]}/{image_hash}"))


@st.cache_data(max_entries=_DATASETS, show_spinner=False)
def dataset(dataset_id: str) -> DatasetFacts:
    """What a data set version holds; versions never change."""
    return read_facts(connections().objects, dataset_id)


@st.cache_data(max_entries=_DATASETS, show_spinner=False)
def embedding(run_id: str) -> Projection:
    """The training images' embeddings of the bundle that `run_id` made, in two dimensions."""
    card, reference = (artifact(run_id, f"{BUNDLE_PATH}/{name}") for name in (CARD, REFERENCE))
    return project(card, reference)
