"""Measurements: what a forward costs, and what a method gains."""
