"""Algorithms as plain tensor functions: advantages of a batch, and losses. `plans.algorithms` has their records,
`table` joins the advantages to them by name."""
