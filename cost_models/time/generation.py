"""Time of generation: prefill, then decode steps over slots that refill while there is a queue, and then run dry."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cost_models.candidates import Array, Candidates, Flags
from cost_models.distinct import distinct
from cost_models.engines.machine import Machine
from cost_models.slots import decode_moments, slots_of
from cost_models.stages import stage_layers
from cost_models.terms import Terms
from cost_models.time import operations
from cost_models.time.inference import ForwardPass, forward_terms
from cost_models.time.layer import expert_gather, forward_layer, hidden_reduce
from cost_models.time.pipeline import stage_send
from cost_models.time.vocabulary import head_and_choice
from plans.lengths import Lengths
from plans.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Generation:
    """`samples` responses, and how long they are; `group_size` of them to a prompt.

    prompt_tokens: mean length of the prompts. attended: the length that their attention costs as much as, E[n^2] / E[n]
    (0: that of equal ones).
    """

    spec: ModelSpec
    samples: float
    prompt_tokens: float
    responses: Lengths
    group_size: int = 1
    attended: float = 0.0


def generation_time(machine: Machine, work: Generation, candidates: Candidates) -> Terms:
    """Terms of a generate call, seconds."""
    return Terms({"prefill": prefill_time(machine, work, candidates)} | decode_terms(machine, work, candidates))


def prefill_time(machine: Machine, work: Generation, candidates: Candidates) -> Array:
    """Seconds to compute the prompts: once for each group where the engine shares them.

    An engine that packs computes the prompts of its first sequences in passes of at most `prefill_tokens`; those of
    later ones join between bursts, one pass each time or less, through an empty pipeline. Others take a pass per group
    in flight, slots after slots, or per micro-batch where those are more. Where a replica waits for nobody, the last
    pass before a burst is a part of its first step (`step_saving`).

    Replicas that share experts make their passes together: of parts of the tokens, when any of them has newcomers, and
    as long as the one with the most.
    """
    c, constants = candidates, machine.constants
    rows, slots = work.samples / c.dp, slots_of(c, work.samples)
    shared = work.group_size if constants.shares_prompts else 1
    prompts = ForwardPass(
        work.spec, work.samples / shared, work.prompt_tokens, head_tokens=1.0, scored=False, attended=work.attended,
        generates=True,
    )  # fmt: skip
    if not constants.prefill_tokens:
        passes = np.maximum(c.groups * np.ceil(rows / slots - 1e-9), c.micro_batches)
        return Terms(forward_terms(machine, prompts, c, passes)).total_s
    begun = np.maximum(slots / shared, 1.0)
    packs = np.maximum(c.groups, np.ceil(begun * work.prompt_tokens * c.joined_replicas / constants.prefill_tokens))
    first, packs = replace(prompts, samples=begun * c.dp), np.minimum(packs, begun)
    seconds = Terms(forward_terms(machine, first, c, packs)).total_s
    if shared == 1:  # samples that begin with others of their prompt wait for it
        seconds = seconds - np.minimum(c.groups, packs) * step_saving(machine, work, c, begun / packs)
    later = np.maximum(rows / shared - begun, 0.0)
    return seconds + _later_prompts(machine, work, c, prompts, begun, later) if (later > 0).any() else seconds


def _later_prompts(
    machine: Machine, work: Generation, candidates: Candidates, prompts: ForwardPass, begun: Array, later: Array
) -> Array:
    """Seconds for the prompts of a replica's newcomers: `later` of them behind the `begun` that begin."""
    c, joined = candidates, candidates.joined_replicas
    shares = work.samples / c.dp / slots_of(c, work.samples)
    bursts = looks = np.ceil(work.responses.mean * shares / np.maximum(burst_steps(machine, c), 1.0))
    if work.responses.full:  # all of a wave end together: as many passes as a whole wave takes, or a part of one
        waves = np.maximum(shares - 1.0, 0.0)
        wave = begun * work.prompt_tokens / machine.constants.prefill_tokens * joined
        bursts, looks = np.floor(waves) * np.ceil(wave) + np.ceil(waves % 1.0 * wave - 1e-9), np.ceil(waves)
    joins = np.clip(bursts, 1.0, np.maximum(later * joined, 1.0))
    each = later / joins
    if not work.responses.full:  # newcomers come at random (Poisson), and the most of any replica count
        each = largest(each, each, joined)
    each = np.maximum(each, np.where(joined > 1, 1.0, 1e-3))
    one = replace(prompts, samples=each * c.dp)
    seconds = joins * Terms(forward_terms(machine, one, c, np.ones_like(later))).total_s
    seconds = seconds - np.minimum(joins, looks) * step_saving(machine, work, c, each)
    return np.where(later > 0, seconds, 0.0)


def step_saving(machine: Machine, work: Generation, candidates: Candidates, prompts: Array) -> Array:
    """Seconds that a pass over so many prompts of a replica takes less where it is a part of a decode step: products,
    sums over tp and gaps between kernels are those of one pass over the prompts' tokens and a token of every slot;
    attention stays apart. The last pass of newcomers before a burst is computed so on a replica that waits for nobody
    (`runtime.generation.flight.Flight.step`); elsewhere nothing is saved."""
    c, alone = candidates, waits_for_nobody(machine, candidates)
    if not alone.any():
        return np.zeros_like(prompts)

    def layer(tokens: Array) -> Array:
        found = forward_layer(machine, work.spec, c, tokens, work.prompt_tokens, generates=True)
        return found.gpu - found.attention

    tokens, slots = prompts * work.prompt_tokens, slots_of(c, work.samples) / c.groups
    saved = layer(tokens) + layer(slots) - layer(tokens + slots)
    return np.where(alone, saved * work.spec.layers + machine.constants.micro_batch_s, 0.0)


def burst_steps(machine: Machine, candidates: Candidates) -> Array:
    """Decode steps between two looks at which sequences have ended."""
    constants = machine.constants
    return np.where(waits_for_nobody(machine, candidates), constants.burst_alone, constants.burst_steps)


def waits_for_nobody(machine: Machine, candidates: Candidates) -> Flags:
    """Replicas of one stage that share no experts, where the engine treats them as such (`burst_alone`)."""
    c = candidates
    alone: Flags = (c.pp == 1) & (c.joined_replicas == 1) & (machine.constants.burst_alone > 0)
    return alone


def decode_terms(machine: Machine, work: Generation, candidates: Candidates) -> dict[str, Array]:
    """Terms of all decode steps: candidates whose bursts are as long are costed together."""
    bursts, sums = burst_steps(machine, candidates), dict[str, Array]()
    for burst in np.unique(bursts):
        at = np.flatnonzero(bursts == burst)
        for name, seconds in _decode_terms(machine, work, candidates.take(at), float(burst)).items():
            sums.setdefault(name, np.zeros(len(candidates)))[at] = seconds
    return sums


def _decode_terms(machine: Machine, work: Generation, candidates: Candidates, burst: float) -> dict[str, Array]:
    """Prefill makes the first token, but where newcomers join between bursts: there the last token of a prompt is the
    first that decoding reads. Replicas that share experts compute as many rows as the one with the most; each of their
    slots has a sequence with the chance `alive`."""
    c, sums = candidates, dict[str, Array]()
    slots = slots_of(c, work.samples)
    first = 0.0 if burst else 1.0
    for moment in decode_moments(work.responses, work.samples / c.dp, slots, first=first, burst=max(burst, 1.0)):
        alive, idle = np.minimum(moment.alive, 1.0), np.maximum(1.0 - moment.alive, 0.0)
        rows = largest(moment.alive, alive * idle / np.maximum(moment.slots, 1.0), c.joined_replicas)
        sequences = moment.slots * c.dp * np.minimum(rows, np.maximum(moment.alive, 1.0))
        step = decode_step(machine, work.spec, c, sequences, work.prompt_tokens + moment.position)
        count = moment.weight * moment.running(c.dp)
        for name, seconds in step.items():
            sums[name] = sums.get(name, 0.0) + seconds * count
    return sums


def largest(mean: Array, variance: Array, count: Array) -> Array:
    """The expected largest of `count` alike independent numbers: mean + sqrt(2 ln count x variance), a bound that is
    close for normal ones (Boucheron, Lugosi and Massart 2013, 2.5). Replicas that share experts wait in every layer for
    the one that has the most."""
    found: Array = mean + np.sqrt(2.0 * np.log(count) * variance)
    return found


def decode_step(
    machine: Machine, spec: ModelSpec, candidates: Candidates, sequences: Array | float, length: Array | float
) -> dict[str, Array]:
    """Terms of one token for every running sequence, seconds; `sequences` over all dp ranks, `length` tokens of each
    in the KV cache.

    Derivation. The batch of a dp rank runs as g groups of `rows` sequences through p stages. A stage spends L x layer
    on a group, L its layers and layer = max(GPU time of the parts, launch time); the last stage has L' <= L of them and
    the head: head + step + rows x row, since the token must be chosen before the group's next round. Call the inner
    stage's time s = L x layer and the last one's t = L' x layer + head.
    * g >= p: every stage always has a group waiting. The slowest stage sets the pace: a round of all groups takes
      g x max(s, t) = g x s + g x max(head - (L - L') x layer, 0).
    * g < p: a group's next token can start only when its own round is done, so that a round takes the latency of one
      trip, (p - 1) x s + t = p x s + head - (L - L') x layer, whatever g is; the last term may be negative.
    Both are max(g, p) x L x layer plus a remainder, which is the term `decode_head`; `decode_host` is the part of layer
    beyond the GPU time. Sends lie between the stages of both, max(g, p) per round (`decode_sends`).
    """
    c, constants = candidates, machine.constants
    rows = np.maximum(sequences / (c.dp * c.groups), 1.0)
    layers, last_layers = stage_layers(spec, c)
    lengths = np.broadcast_to(np.asarray(length, dtype=np.float64), rows.shape)
    first, inverse = distinct(rows, lengths, c.tp, c.ep, c.gpus_per_node)
    each = _decode_parts(machine, spec, c.take(first), rows[first], lengths[first])
    spread = {name: seconds[inverse] for name, seconds in each.items()}
    logits = spread.pop("head") + np.where(c.pp == 1, spread.pop("embedding"), 0.0)
    kernels = constants.decode_layer_s + constants.decode_experts_s * spec.expert_layers / spec.layers
    parts = spread | {"decode_kernels": np.full_like(rows, kernels)}
    layer = sum(parts.values(), np.zeros_like(rows))
    parts["decode_host"] = np.maximum(constants.host_decode_layer_s - layer, 0.0)
    turns = np.maximum(c.groups, c.pp) * layers
    terms = {name: seconds * turns for name, seconds in parts.items()}
    # A lone group passes every stage in turn and gains wherever one is shorter; with more, only the last one's slack
    # counts.
    missing = np.where(c.groups >= c.pp, layers - last_layers, layers * c.pp - spec.layers)
    short = missing * np.maximum(layer, constants.host_decode_layer_s)
    head = logits + constants.decode_step_s + rows * constants.decode_row_s
    steady = np.where(c.groups >= c.pp, np.maximum(head - short, 0.0), head - short)
    terms["decode_head"] = steady * np.where(c.groups >= c.pp, c.groups, 1.0)
    terms["decode_p2p"] = decode_sends(machine, spec, c, rows)
    return terms


def _decode_parts(
    machine: Machine, spec: ModelSpec, candidates: Candidates, rows: Array, length: Array
) -> dict[str, Array]:
    """Seconds of one layer's parts, of the head, and of summing the embedding's output."""
    c = candidates
    return {
        "decode_linears": operations.linears(machine, spec, rows, c.tp, c.ep),
        "decode_attention": decode_attention(machine, spec, c, rows, length),
        "decode_tensor_parallel": decode_all_reduce(machine, spec, c, rows) + expert_gather(machine, spec, c, rows),
        "head": head_and_choice(machine, spec, rows, c),
        "embedding": hidden_reduce(machine, spec, c, rows),
    }


def decode_attention(machine: Machine, spec: ModelSpec, candidates: Candidates, rows: Array, length: Array) -> Array:
    """Seconds to read the keys and values of one layer: rows x length x 2 x kv_heads / tp x head_dim elements; with
    latent attention the vector that all heads share."""
    if spec.latent_width:
        return machine.kernels.cache_read(spec.latent_width // 2, rows, length, np.ones_like(candidates.tp))
    kv_heads = np.maximum(spec.kv_heads / candidates.tp, 1.0)
    return machine.kernels.cache_read(spec.head_dim, rows, length, kv_heads)


def decode_all_reduce(machine: Machine, spec: ModelSpec, candidates: Candidates, rows: Array) -> Array:
    """Seconds of the two small all-reduces of [rows, hidden] per layer, mostly latency."""
    return 2.0 * hidden_reduce(machine, spec, candidates, rows)


def decode_sends(machine: Machine, spec: ModelSpec, candidates: Candidates, rows: Array) -> Array:
    """Seconds of sends between stages and of the token back to the first, per step of all groups."""
    c = candidates
    one = stage_send(machine, spec, c, rows)
    return np.where(c.pp > 1, np.maximum(c.groups, c.pp) * one, 0.0)
