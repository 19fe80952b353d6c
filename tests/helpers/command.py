"""The command line in this process."""

from __future__ import annotations

import pytest

from erde.cli import main


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run ``erde`` with ``arguments``; its exit code."""
    monkeypatch.setattr("sys.argv", ["erde", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code
