"""MedLoop's dashboard: where people look at answers and runs, correct, and approve. Streamlit, port 8501."""
