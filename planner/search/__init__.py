"""The search core: numbered problems, what a decision costs, Metropolis-Hastings and the exact solver."""
