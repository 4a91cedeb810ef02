"""Generation with a KV cache on one data-parallel replica: tensor and pipeline parallel, CPU and CUDA alike.

The sequences are cut into groups in flight. Pipeline stages take the groups in turn, so that a stage works on one group
while the next stage works on the one before; hidden states go from stage to stage, and the last stage broadcasts the
chosen tokens to its pipeline. Every rank sees every token, so all decide alike which rows have finished and leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from runtime.models.model import Model
from runtime.models.modules import KVCache
from runtime.passes.sampling import Sampling, choose_tokens, sample_keys

LEAVE_FRACTION = 8  # finished rows leave when they are one in so many: each time, the KV cache is copied


@dataclass(frozen=True)
class Generated:
    """Sequences of a replica, the same on all its ranks.

    tokens: [n, prompt_tokens + response_tokens] int64, padded on both sides. mask: the same shape, True at prompt and
    response tokens, the stop token included. logprobs: [n, response_tokens] float32 at the sampling temperature, 0
    after the end. lengths: [n] int64, response tokens with the stop token.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    lengths: Tensor


def generate(
    model: Model,
    prompts: Tensor,
    prompt_lengths: Tensor,
    sample_ids: Tensor,
    *,
    response_tokens: int,
    groups: int = 1,
    sampling: Sampling,
    seed: int,
    iteration: int,
    stop_ids: Sequence[int],
    pad_id: int,
) -> Generated:
    """Continue prompts [n, prompt_tokens], padded on the left, by up to `response_tokens` tokens each.

    Collective over the ranks of a replica, which all give the same arguments. `prompt_lengths` [n] are at least 1.
    `sample_ids` [n] are the global numbers of the samples: with `seed` and `iteration` they fix the tokens. `groups`
    groups of sequences are in flight. A row ends with the first of `stop_ids`.
    """
    assert len(model.chunks) == 1 and not model.config.sequence_parallel, "generation has its own layout"
    result = _empty(prompts.to(model.device), prompt_lengths.to(model.device), response_tokens, pad_id)
    if not len(prompts):
        return result
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=model.device)
    rows = torch.arange(len(prompts), device=model.device)
    keys = sample_keys(seed, iteration, sample_ids.to(model.device))
    with _evaluating(model), torch.inference_mode():
        pipeline = _Pipeline(model, sampling)
        flights = [_Flight(part, keys[part], result, prompts.shape[1]) for part in rows.chunk(groups)]
        for position in range(response_tokens):
            for flight in flights:
                flight.land(stops)
                if len(flight.rows):
                    flight.choice = pipeline.step(flight, position)
        for flight in flights:
            flight.land(stops)
    return result


def _empty(prompts: Tensor, prompt_lengths: Tensor, response_tokens: int, pad_id: int) -> Generated:
    rows, width = prompts.shape
    mask = torch.arange(width, device=prompts.device) >= width - prompt_lengths[:, None]
    after = prompts.new_full((rows, response_tokens), pad_id)
    return Generated(
        tokens=torch.cat([prompts, after], dim=1),
        mask=torch.cat([mask, torch.zeros_like(after, dtype=torch.bool)], dim=1),
        logprobs=torch.zeros_like(after, dtype=torch.float32),
        lengths=torch.zeros_like(prompt_lengths),
    )


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Megatron caches keys and values only in evaluation mode."""
    chunk = model.chunks[0]
    training = chunk.training
    chunk.eval()
    try:
        yield
    finally:
        chunk.train(training)


class _Choice:
    """Tokens and log-probabilities [n, 2] float64 of one step, possibly still on their way."""

    def __init__(self, position: int, values: Tensor, work: Any = None) -> None:
        self.position = position
        self._values = values
        self._work = work

    def wait(self) -> tuple[Tensor, Tensor]:
        """Tokens [n] int64 and log-probabilities [n] float32."""
        if self._work is not None:
            self._work.wait()
        return self._values[:, 0].long(), self._values[:, 1].float()


class _Flight:
    """A group of sequences in flight: its rows that are still in the batch, their cache and their newest tokens.

    Columns that are padding in every row of the group are left out.
    """

    def __init__(self, rows: Tensor, keys: Tensor, result: Generated, prompt_tokens: int) -> None:
        self.rows = rows
        self.keys = keys
        self.choice: _Choice | None = None
        self._result = result
        self._start = prompt_tokens
        real = result.mask[rows, :prompt_tokens]
        first = int(real.any(0).int().argmax())
        self.inputs = result.tokens[rows, first:prompt_tokens]
        self._padding: Tensor | None = F.pad(~real[:, first:], (0, result.logprobs.shape[1]))
        if not bool(self._padding.any()):
            self._padding = None
        self.cache = KVCache(len(rows), prompt_tokens - first + result.logprobs.shape[1])
        self._live = torch.ones_like(rows, dtype=torch.bool)

    def mask(self) -> Tensor | None:
        """The attention mask of the next forward, True is masked out; None where causality says all."""
        if self._padding is None:
            return None
        done, new = self.cache.sequence_len_offset, self.inputs.shape[1]
        hidden = self._padding[:, None, None, : done + new]
        if new == 1:
            return hidden
        # A padded position sees itself, because a softmax over nothing is not a number.
        square = torch.ones(new, new, dtype=torch.bool, device=hidden.device)
        return (hidden | square.triu(1)) & ~torch.eye(new, dtype=torch.bool, device=hidden.device)

    def land(self, stops: Tensor) -> None:
        """Take the tokens that were chosen last into the result; let finished rows leave."""
        if self.choice is None:
            return
        tokens, logprobs = self.choice.wait()
        position, live, rows, result = self.choice.position, self._live, self.rows, self._result
        self.choice = None
        column = self._start + position
        result.tokens[rows, column] = torch.where(live, tokens, result.tokens[rows, column])
        result.mask[rows, column] = live
        result.logprobs[rows, position] = logprobs * live
        result.lengths[rows] += live
        self.inputs = tokens[:, None]
        self._live = live & ~torch.isin(tokens, stops)
        left = int(self._live.sum())
        if (len(rows) - left) * LEAVE_FRACTION >= len(rows):
            self._keep(self._live.nonzero().squeeze(1))

    def _keep(self, places: Tensor) -> None:
        self.rows, self.keys, self.inputs = self.rows[places], self.keys[places], self.inputs[places]
        self._live = self._live[places]
        if self._padding is not None:
            self._padding = self._padding[places]
        store = self.cache.key_value_memory_dict
        for layer, pair in store.items():
            store[layer] = tuple(tensor.index_select(1, places) for tensor in pair)


class _Pipeline:
    """This rank's stage and its exchange with the other stages."""

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self._model = model
        self._sampling = sampling
        self._ranks: list[int] = dist.get_process_group_ranks(model.groups.pp)
        self._sent: tuple[Any, Tensor] | None = None

    def step(self, flight: _Flight, position: int) -> _Choice:
        """Run the stage on the newest tokens of a group; the tokens that follow, on all ranks of the pipeline."""
        model, group = self._model, self._model.groups.pp
        hidden = self._forward(flight)
        if model.last_stage:
            logits = self._logits(hidden[-1])
            tokens, logprobs = choose_tokens(
                logits, flight.keys, position, self._sampling, model.spec.vocab, model.groups.tp
            )
            values = torch.stack([tokens.double(), logprobs], dim=1)
        else:
            self._send(hidden)
            values = torch.empty(len(flight.rows), 2, dtype=torch.float64, device=model.device)
        if len(self._ranks) == 1:
            return _Choice(position, values)
        return _Choice(position, values, dist.broadcast(values, src=self._ranks[-1], group=group, async_op=True))

    def _forward(self, flight: _Flight) -> Tensor:
        """Hidden states [tokens, rows, hidden] behind this stage; the cache advances."""
        chunk, cache = self._model.chunks[0], flight.cache
        rows, new = flight.inputs.shape
        hidden = None
        if self._model.first_stage:
            hidden = chunk.embedding(input_ids=flight.inputs, position_ids=None)
        else:
            chunk.set_input_tensor(self._receive((new, rows, self._model.spec.hidden)))
        out: Tensor = chunk.decoder(
            hidden_states=hidden,
            attention_mask=flight.mask(),
            inference_context=cache,
            rotary_pos_emb=chunk.rotary_pos_emb(cache.max_sequence_length),
        )
        cache.sequence_len_offset += new
        return out

    def _logits(self, hidden: Tensor) -> Tensor:
        """This rank's part of the vocabulary, [rows, padded vocabulary / tp]."""
        chunk = self._model.chunks[0]
        tied = self._model.spec.tied_embeddings
        logits, _ = chunk.output_layer(hidden, weight=chunk.shared_embedding_or_output_weight() if tied else None)
        return torch.as_tensor(logits)

    def _receive(self, shape: tuple[int, ...]) -> Tensor:
        hidden = torch.empty(shape, dtype=self._model.config.params_dtype, device=self._model.device)
        dist.recv(hidden, src=self._ranks[self._model.place.pp - 1], group=self._model.groups.pp)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        """Send to the next stage without waiting for it; at most one message is on its way."""
        if self._sent is not None:
            self._sent[0].wait()
        hidden = hidden.contiguous()
        work = dist.isend(hidden, dst=self._ranks[self._model.place.pp + 1], group=self._model.groups.pp)
        self._sent = (work, hidden)
