"""Megatron-core models: their parts, how they are built from a specification and a layout, and what cannot be run."""
