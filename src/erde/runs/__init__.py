"""Run folders: the chain from training to evaluation, resumable at any moment."""
