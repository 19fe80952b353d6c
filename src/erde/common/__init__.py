"""Errors, files, progress, splits, images: what every room uses. Imports: the standard library, numpy, Pillow, pydantic."""
