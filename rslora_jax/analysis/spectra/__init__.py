"""Spectra: singular values of what was learned, and the ranks that they suggest."""
