"""Run folders: the chain from training to evaluation, resumable at any moment."""

# First of all imports: where torch is missing the message names the extra that has it, not that of a smaller package.
import torch as torch
