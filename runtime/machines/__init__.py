"""The machines of a run: a realrun on each. The first one says what is to be done, and goes on without the lost."""
