"""Shared fixtures for tests of output files."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip syncs, which tests/soak/faults.py checks; they take most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
