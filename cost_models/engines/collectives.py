"""Collectives by bytes, group size and placement, from formulas; everything vectorised.

A group has `size` ranks, `per_node` of them on each node. Ring algorithms send (size - 1) / size of the data along
every link; a group that spans nodes is bound by its share of the network cards: all groups of a node run at the same
time, so a group with `per_node` ranks on a node has that many GPUs' shares. Time is

    latency + wire bytes / bandwidth * (1 + sqrt(half_bytes / bytes))

whose ramp fits NCCL's mid sizes. Inside a node the bandwidth is the link's x (1 - 1/n^2) for n ranks: few ranks keep
fewer channels busy. Against nccl-tests tables of A100, H100, H200 and B200 (16 KiB to 512 MiB) the mean error is 8 to
10 %; engines that go by measured kernels take the tables themselves. Bus bandwidth is counted as nccl-tests does
(PERFORMANCE.md).
"""

from __future__ import annotations

import numpy as np

from cost_models.candidates import Array, Flags
from cost_models.engines.rates import Rates


def _wire(
    rates: Rates, sent: Array, message: Array, size: Array, per_node: Array, rounds: float, share: float = 1.0
) -> Array:
    """Seconds of a collective whose busiest rank sends `sent` bytes of a `message` in `rounds` passes of the ring, at
    a `share` of the links' bandwidth.

    The latency is that of a tree, not of a ring: NCCL sends small messages along double binary trees (Sanders, Speck
    and Traff 2009; NCCL 2.4), log2(size) levels deep, of which log2(size / per_node) lie between nodes. An all-reduce
    goes up the tree with partial sums and down with the result, two rounds: `link_hop_s` is a level up and down, and
    `network_latency_s` what a level between nodes takes besides. A one-way collective is one round, half of both.
    `link_latency_s` is what launching any collective takes, whatever its size.
    """
    constants = rates.constants
    across = size > per_node
    latency = constants.link_latency_s + 0.5 * rounds * constants.link_hop_s * np.log2(size)
    latency = latency + across * (0.5 * rounds * constants.network_latency_s * np.log2(size / per_node))
    width = np.maximum(per_node, 2.0)
    links = rates.link_bytes_per_s * share * (1.0 - 1.0 / (width * width))
    bandwidth = np.where(across, np.minimum(links, per_node * rates.network_bytes_per_s), links)
    half = np.where(across, constants.network_half_bytes, constants.link_half_bytes)
    ramp = 1.0 + np.sqrt(half / np.maximum(message, 1.0))
    return np.where(size > 1, latency + sent / bandwidth * ramp, 0.0)


def all_reduce(rates: Rates, message: Array, size: Array, per_node: Array) -> Array:
    """Seconds to sum `message` bytes over a group: 2 (size - 1) / size of them go over the busiest link."""
    return _wire(rates, 2.0 * (size - 1) / size * message, message, size, per_node, 2.0)


def all_gather(rates: Rates, message: Array, size: Array, per_node: Array) -> Array:
    """Seconds to gather `message` bytes in all, message / size from each rank."""
    share = rates.constants.all_gather_efficiency
    return _wire(rates, (size - 1) / size * message, message, size, per_node, 1.0, share)


def reduce_scatter(rates: Rates, message: Array, size: Array, per_node: Array) -> Array:
    """Seconds to sum `message` bytes and leave message / size on each rank; the mirror of all-gather."""
    share = rates.constants.reduce_scatter_efficiency
    return _wire(rates, (size - 1) / size * message, message, size, per_node, 1.0, share)


def scattered_all_reduce(rates: Rates, message: Array, size: Array, per_node: Array) -> Array:
    """Seconds of an all-reduce cut into a reduce-scatter and an all-gather of the same bytes; a ring all-reduce is the
    two in turn, so that the time is the same where the library is as good at either."""
    constants = rates.constants
    halves = 0.5 / constants.reduce_scatter_efficiency + 0.5 / constants.all_gather_efficiency
    return all_reduce(rates, message, size, per_node) * halves


def leaving_node(rates: Rates, message: Array, size: Array, per_node: Array) -> Array:
    """Seconds for the part of an all-to-all that leaves the node, (size - per_node) / size, over each GPU's own share
    of the network."""
    seconds: Array = message * (size - per_node) / size / rates.network_bytes_per_s
    return seconds


def point_to_point(rates: Rates, message: Array, across: Flags) -> Array:
    """Seconds to send `message` bytes to one rank, over the network where `across`."""
    constants = rates.constants
    bandwidth = np.where(across, rates.send_bytes_per_s, rates.link_send_bytes_per_s)
    latency = constants.link_latency_s + across * constants.network_latency_s
    return latency + message / bandwidth
