"""Collectives by bytes, group size and placement; everything vectorised.

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
from cost_models.time import measured
from cost_models.time.distinct import on_distinct
from cost_models.time.machine import Machine


def _wire(
    machine: Machine, sent: Array, message: Array, size: Array, per_node: Array, rounds: float, share: float = 1.0
) -> Array:
    """Seconds of a collective whose busiest rank sends `sent` bytes of a `message` in `rounds` passes of the ring, at
    a `share` of the links' bandwidth."""
    engine = machine.engine
    across = size > per_node
    latency = engine.link_latency_s + 0.5 * rounds * engine.link_hop_s * np.log2(size)
    latency = latency + across * (0.5 * rounds * engine.network_latency_s * np.log2(size / per_node))
    width = np.maximum(per_node, 2.0)
    links = machine.link_bytes_per_s * share * (1.0 - 1.0 / (width * width))
    bandwidth = np.where(across, np.minimum(links, per_node * machine.network_bytes_per_s), links)
    half = np.where(across, engine.network_half_bytes, engine.link_half_bytes)
    ramp = 1.0 + np.sqrt(half / np.maximum(message, 1.0))
    return np.where(size > 1, latency + sent / bandwidth * ramp, 0.0)


def _measured_inside(
    machine: Machine, operation: str, message: Array, size: Array, per_node: Array, analytic: Array
) -> Array:
    """The measured seconds, in place, where the engine goes by kernel tables and the group is inside a node."""
    if machine.kernels is None or f"{operation}_node" not in machine.kernels.entries:
        return analytic
    message, size, per_node = np.broadcast_arrays(message, size, per_node)
    inside = (size == per_node) & np.isin(size, measured.RANKS)

    def seconds(message: Array, size: Array) -> Array:
        return measured.collective(machine, operation, message, size).value

    if inside.any():
        analytic[inside] = on_distinct(seconds, message[inside], size[inside])
    return analytic


def all_reduce(machine: Machine, message: Array, size: Array, per_node: Array) -> Array:
    """Seconds to sum `message` bytes over a group; every rank ends with the sum."""
    analytic = _wire(machine, 2.0 * (size - 1) / size * message, message, size, per_node, 2.0)
    return _measured_inside(machine, "all_reduce", message, size, per_node, analytic)


def all_gather(machine: Machine, message: Array, size: Array, per_node: Array) -> Array:
    """Seconds to gather `message` bytes in all, message / size from each rank."""
    share = machine.engine.all_gather_efficiency
    analytic = _wire(machine, (size - 1) / size * message, message, size, per_node, 1.0, share)
    return _measured_inside(machine, "all_gather", message, size, per_node, analytic)


def reduce_scatter(machine: Machine, message: Array, size: Array, per_node: Array) -> Array:
    """Seconds to sum `message` bytes and leave message / size on each rank; the mirror of all-gather."""
    share = machine.engine.reduce_scatter_efficiency
    analytic = _wire(machine, (size - 1) / size * message, message, size, per_node, 1.0, share)
    return _measured_inside(machine, "reduce_scatter", message, size, per_node, analytic)


def all_to_all(machine: Machine, message: Array, size: Array, per_node: Array) -> Array:
    """Seconds in which every rank sends `message` bytes in equal parts to the ranks of the group.

    Across nodes each GPU has only its own share of the network for the (size - per_node) / size that leaves.
    """
    inside = all_gather(machine, message, size, size)
    leaving = message * (size - per_node) / size / machine.network_bytes_per_s
    return np.where(size > 1, np.maximum(inside, leaving), 0.0)


def point_to_point(machine: Machine, message: Array, across: Flags) -> Array:
    """Seconds to send `message` bytes to one rank, over the network where `across`."""
    engine = machine.engine
    bandwidth = np.where(across, machine.send_bytes_per_s, machine.link_send_bytes_per_s)
    latency = engine.link_latency_s + across * engine.network_latency_s
    return latency + message / bandwidth
