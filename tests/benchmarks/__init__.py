"""Measurements, kept apart from the tests: machines are noisy, and a timed test fails for reasons of its own."""
