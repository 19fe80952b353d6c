"""Data sets to four splits, and the train split to batches. May import: recipe, common."""
