"""Helpers of several test modules: synthetic data with known truth, and calls of the app."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
"""The repository."""
