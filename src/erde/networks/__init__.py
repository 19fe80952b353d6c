"""Backbones, exits on any classifier, their heads, costs and weights. May import: common."""
