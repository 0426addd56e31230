"""The pages, each drawn by a module's `show()`; nothing outside this folder and app.py imports Streamlit."""
