"""The explainer: says why a model answers as it does, and how far that reason can be trusted."""
