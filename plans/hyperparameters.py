"""What a run file says of the algorithm and its optimizers, and the ranges of its numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from plans.problems import REFUSED

Positive = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
ZeroToOne = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
MOST_REAL = 1e30
"""Of numbers that meet tensors: float32 holds 3.4e38, and torch refuses what it cannot hold."""
Above = Annotated[float, Field(gt=0, le=MOST_REAL)]
NotNegative = Annotated[float, Field(ge=0, le=MOST_REAL)]


class Closed(BaseModel):
    """A part of a run file: unknown keys and values of other types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True, allow_inf_nan=False)


class Optimizer(Closed):
    """AdamW. The rate rises linearly over `warmup_steps` and then stays (constant), or falls linearly or as half a
    cosine to `final_lr` x lr at the last step of the run. `clip` bounds the global gradient norm.

    router_aux_loss_coef: how much the balance of experts counts in the loss, for models that have them: the auxiliary
    loss of `transformers`, of each sequence and layer alone, and the mean of these. null: what the config of the
    weights says where `transformers` obeys it (`output_router_logits`), else nothing."""

    lr: NotNegative = 1e-6
    warmup_steps: Count = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_lr: ZeroToOne = 0.0
    weight_decay: NotNegative = 0.0
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    clip: Above = 1.0
    router_aux_loss_coef: NotNegative | None = None


class Ppo(Closed):
    """The clipped objective (Schulman et al. 2017) with a KL to the reference, for PPO and the critic-free algorithms.

    clip: how far the ratio may leave 1 downwards, and upwards where clip_high (DAPO's clip-higher) is null. dual_clip:
    the most that a ratio counts where the advantage is negative (Ye et al. 2020). ratio: of tokens, or of whole
    responses (`sequence`, GSPO). loss_average: over the tokens of a minibatch (DAPO), first over each response
    (`sequence`, GRPO's paper), or over samples x response_tokens (`constant`, Dr. GRPO).

    The KL is a penalty in the reward (Ouyang et al. 2022), for GRPO a term of the loss; kl_in says otherwise.
    entropy_coefficient: how much of the policy's entropy is added to the objective (Mnih et al. 2016, section 4).
    kl_estimator: k1, k2 or k3 of Schulman 2020; k1 in the reward and k3 in the loss where it is null. kl_target: the KL
    of whole responses, in nats, that kl_coefficient follows from iteration to iteration, the slower the more samples
    kl_horizon has (Ziegler et al. 2019); null keeps it.

    importance_cap: each token's part of the objective is weighed by what the training layout's weights before the first
    step give it, over what generation gave it, to this at most (truncated importance sampling: Yao et al. 2025); or by
    the whole response's (importance: sequence). It needs recomputed log-probs and corrects what generation computes
    otherwise, and the age of its weights under `--async`.

    reward_clip bounds scores (null: not at all). overlong_tokens, overlong_penalty: a response that comes within so
    many tokens of response_tokens loses reward in proportion (DAPO's soft punishment). drop_flat_groups: responses
    whose group has no spread of scores are left out of the loss, before any penalty of length (DAPO's filter).
    train_prompts: DAPO's dynamic sampling where a plan says how much is generated: of the batch so many prompts are
    trained on, the first whose groups have a spread, an equal part in each minibatch; fewer where there are not enough.
    What is left out costs no training time.

    gamma: PPO, REINFORCE++ and ReMax. divide_by_deviation: GRPO; false is Dr. GRPO's advantage. value_clip, gae_lambda,
    whiten_advantages, critic_warmup_iterations: PPO.
    """

    clip: Above = 0.2
    clip_high: Above | None = None
    dual_clip: Annotated[float, Field(gt=1, le=MOST_REAL)] | None = None
    ratio: Literal["token", "sequence"] = "token"
    loss_average: Literal["token", "sequence", "constant"] = "token"
    value_clip: Above = 0.2
    kl_coefficient: NotNegative = 0.05
    importance_cap: Above | None = None
    importance: Literal["token", "sequence"] = "token"
    entropy_coefficient: NotNegative = 0.0
    kl_in: Literal["reward", "loss"] | None = None
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    kl_target: Above | None = None
    kl_horizon: Positive = 10_000
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    gae_lambda: ZeroToOne = 0.95
    whiten_advantages: bool = True
    divide_by_deviation: bool = True
    reward_clip: Above | None = None
    overlong_tokens: Count = 0
    overlong_penalty: NotNegative = 1.0
    drop_flat_groups: bool = False
    train_prompts: Count = 0
    critic_warmup_iterations: Count = 0

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Ppo:
        if self.kl_target is not None and not self.kl_coefficient:
            message = "kl_target changes kl_coefficient by factors, and it is 0"
            raise PydanticCustomError(REFUSED, message, {"hint": "kl_coefficient: 0.05"})
        return self


class Dpo(Closed):
    """DPO (Rafailov et al. 2023)."""

    beta: Above = 0.1
