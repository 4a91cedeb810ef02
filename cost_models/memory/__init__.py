"""Bytes on every GPU at every moment."""
