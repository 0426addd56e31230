"""The trainer: turns a data set version into a registered model version."""
