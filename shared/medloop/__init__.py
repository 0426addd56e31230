"""MedLoop's shared library: everything that two services must agree on."""

__version__ = "0.1.0"
