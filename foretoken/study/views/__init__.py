"""Figures and tables made from rows, one file per analysis."""
