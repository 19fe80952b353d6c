"""``python -m erde``."""

from erde.cli import main

main()
