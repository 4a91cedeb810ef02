"""The operations that are timed: embedding, block, head with loss, optimizer and whole calls of the runtime's models.

A shard is a model of one layer whose sizes are those of one rank of a tp-way cut, built and trained by the runtime on
this process alone, so that the code that is timed is the code that will run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor

from plans.model import ModelSpec
from profiler.alone import single_rank_model
from profiler.decoding import DecodingShard
from profiler.timers import Timed
from runtime.generation.attention import Pool, prefill_attention
from runtime.generation.generate import generate
from runtime.generation.lean import Attend, LeanStage
from runtime.generation.sampling import Sampling
from runtime.groups import GroupCache
from runtime.passes.forward import TokenOutput, token_logprobs
from runtime.passes.logprobs import token_logprobs_of
from runtime.passes.optimizer import AdamSettings
from runtime.passes.packs import Batch
from runtime.passes.training import Trainer
from runtime.sequences import Sequences

Point = Mapping[str, int]


class Shard:
    """Holds the model of a shard with its gradient buffers and optimizer, and gives its operations."""

    def __init__(self, spec: ModelSpec, groups: GroupCache, device: torch.device, dtype: torch.dtype) -> None:
        self.model = single_rank_model(spec, groups, device, dtype)
        self.trainer = Trainer(self.model, AdamSettings())
        self._chunk = self.model.chunks[0]
        self._groups, self._device, self._dtype = groups, device, dtype

    @property
    def parameters(self) -> int:
        """Local parameters."""
        return sum(parameter.numel() for parameter in self._chunk.parameters())

    def operation(self, name: str, point: Point) -> Timed:
        """An operation of `cost_models.tables.tables.OPERATIONS` at a point by axis."""
        made: Timed = getattr(self, f"_{name}")(**point)
        return made

    def _tokens(self, sequences: int, tokens: int) -> Tensor:
        return torch.randint(self.model.spec.vocab, (sequences, tokens), device=self._device)

    def _hidden(self, tokens: int, sequences: int) -> Tensor:
        shape = (tokens, sequences, self.model.spec.hidden)
        return torch.randn(shape, device=self._device, dtype=self._dtype, requires_grad=True)

    def _embed(self, ids: Tensor) -> Tensor:
        self._chunk.train()
        return torch.as_tensor(self._chunk.embedding(input_ids=ids, position_ids=None))

    def _embedding_forward(self, tokens: int) -> Timed:
        ids = self._tokens(1, tokens)
        return Timed(lambda _: self._embed(ids))

    def _embedding_backward(self, tokens: int) -> Timed:
        ids = self._tokens(1, tokens)
        return _backward(lambda: self._embed(ids))

    def _block(self, sequences: int, sequence_tokens: int) -> Callable[[], Tensor]:
        """The forward pass of a block on random hidden states. Rotations are made once for all layers of a model."""
        self._chunk.train()
        hidden, rotation = self._hidden(sequence_tokens, sequences), self._rotation(sequence_tokens)
        layer = self._chunk.decoder.layers[0]

        def forward() -> Tensor:
            return torch.as_tensor(layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotation)[0])

        return forward

    def _rotation(self, tokens: int) -> Tensor:
        positions = torch.arange(tokens, device=self._device)
        return torch.as_tensor(self._chunk.rotary_pos_emb.rotation(positions, tokens, self._dtype))

    def _block_forward(self, sequences: int, sequence_tokens: int) -> Timed:
        forward = self._block(sequences, sequence_tokens)
        return Timed(lambda _: forward())

    def _block_inference(self, sequences: int, sequence_tokens: int) -> Timed:
        """A block of log-probabilities and values, of which nothing is kept."""
        forward = torch.no_grad()(self._block(sequences, sequence_tokens))
        return Timed(lambda _: forward())

    def _block_backward(self, sequences: int, sequence_tokens: int) -> Timed:
        return _backward(self._block(sequences, sequence_tokens))

    def _block_recompute(self, sequences: int, sequence_tokens: int) -> Timed:
        """Backward of a block that is recomputed first; the profile subtracts `block_backward`."""
        self._chunk.train()
        hidden, rotation = self._hidden(sequence_tokens, sequences), self._rotation(sequence_tokens)

        def forward() -> Tensor:
            with _full_recompute(self.model.config):
                out = self._chunk.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotation)
                return torch.as_tensor(out)

        return _backward(forward)

    @cached_property
    def _stage(self) -> LeanStage:
        """As of a long generation."""
        return LeanStage(self.model, inf)

    def _block_prefill(self, sequences: int, sequence_tokens: int) -> Timed:
        """Prompts end to end through a block of generation, their keys and values stored."""
        stage, device = self._stage, self._device
        hidden = self._hidden(sequence_tokens, sequences).detach().flatten(0, 1)
        pool = Pool(stage, sequences, sequence_tokens)
        attend = prefill_attention(stage, pool, torch.arange(len(hidden), device=device), [sequence_tokens] * sequences)
        rotation = stage.rotation(sequence_tokens).repeat(sequences, 1, 1, 1, 1)
        return Timed(lambda _: _lean(stage, hidden, rotation, attend))

    @cached_property
    def _decoding(self) -> DecodingShard:
        return DecodingShard(self.model.spec, self._groups, self._device, self._dtype)

    def _block_decode(self, sequences: int, cached_tokens: int) -> Timed:
        """A token of each slot through a block of generation, on `cached_tokens` before it."""
        return self._decoding.block(sequences, cached_tokens)

    def _logprobs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        self._chunk.train()
        tied = self.model.spec.tied_embeddings
        rows = self._chunk.decoder.final_layernorm(hidden).squeeze(1)
        weight = self._chunk.shared_embedding_or_output_weight() if tied else self._chunk.output_layer.weight
        return token_logprobs_of(rows, weight, tokens, self.model.groups.tp, self.model.spec.vocab)[0].sum()

    def _head_forward(self, tokens: int) -> Timed:
        hidden, ids = self._hidden(tokens, 1), self._tokens(1, tokens)[0]
        return Timed(lambda _: self._logprobs(hidden, ids))

    def _head_backward(self, tokens: int) -> Timed:
        hidden, ids = self._hidden(tokens, 1), self._tokens(1, tokens)[0]
        return _backward(lambda: self._logprobs(hidden, ids))

    def optimizer_step(self) -> Timed:
        """Clip and Adam on all local parameters."""
        return Timed(lambda _: self.trainer.update(1e-6))

    def _batch(self, sequences: int, tokens: int) -> Batch:
        """Samples whose tokens are all of the response but the first."""
        ids = self._tokens(sequences, tokens).flatten()
        return Batch(Sequences(ids, (1,) * sequences, (tokens - 1,) * sequences), {})

    def _train_call(self, sequences: int, sequence_tokens: int) -> Timed:
        batch = self._batch(sequences, sequence_tokens)
        return Timed(lambda _: self.trainer.step(batch, _summed))

    def _inference_call(self, sequences: int, sequence_tokens: int) -> Timed:
        batch = self._batch(sequences, sequence_tokens)
        return Timed(lambda _: token_logprobs(self.model, batch.sequences))

    def generation(self, sequences: int, prompt_tokens: int, response_tokens: int) -> Timed:
        """A whole generation; `generate_step` is the difference of two, by their tokens."""
        prompts = self._tokens(sequences, prompt_tokens).tolist()

        def run(_: None) -> object:
            return generate(
                self.model,
                prompts,
                range(sequences),
                response_tokens=response_tokens,
                sampling=Sampling(),
                seed=0,
                iteration=0,
            )

        return Timed(run)


@torch.inference_mode()
def _lean(stage: LeanStage, hidden: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
    return stage.layers(hidden, rotation, attend)


def _backward(forward: Any) -> Timed:
    """The backward pass alone; the gradients go into the trainer's buffers."""

    def prepare() -> tuple[Tensor, Tensor]:
        out = forward()
        return out, torch.ones_like(out)

    return Timed(lambda pair: pair[0].backward(pair[1]), prepare)


def _summed(output: TokenOutput, _: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    loss = output.logprobs.mean()
    return loss, {"loss": loss}


@contextmanager
def _full_recompute(config: Any) -> Iterator[None]:
    """Let Megatron's block recompute every layer while this holds."""
    before = config.recompute_granularity, config.recompute_method, config.recompute_num_layers
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    try:
        yield
    finally:
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = before
