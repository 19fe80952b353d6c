"""Bundles against the clock."""
