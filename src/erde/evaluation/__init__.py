"""Policies on the test split, their results, and run folders as they are read. No torch."""
