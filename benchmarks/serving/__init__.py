"""Inference beside the servers that people would otherwise put a model behind."""
