"""`realrun` for a launcher of processes that are no Python of ours: it runs in a process that has imported torch."""

from warm import stand_for

stand_for("from runtime.cli import main; main()")
