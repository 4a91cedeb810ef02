"""Engines: who runs the calls, with which constants and memory habits; a machine is an engine on a cluster."""
