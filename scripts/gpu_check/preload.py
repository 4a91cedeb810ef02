"""Imported once by the server that forks the stages of a rehearsal."""

import torch._dynamo  # noqa: F401 - torch.optim imports it

import runtime.executor  # noqa: F401
