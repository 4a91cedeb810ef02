"""Right: the fixture model on the device against the CPU: tokens, losses, layouts, moved weights, clear failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gpu_check.captured import captured_decode, experts_together
from gpu_check.moves import moved_weights, offloaded_state
from gpu_check.plays import Places, Play, Played, fixture_plan, fixture_run, play
from gpu_check.rows import Case, Row, Skip, judged
from gpu_check.setting import FIXTURE, Setting
from gpu_check.worlds import RankFailed, reference_world, run_world, run_worlds, world_of
from plans.errors import RealplanError
from plans.library import load_model
from plans.model import ModelSpec

ALGORITHMS = ("ppo", "grpo", "dpo", "sft")
LOSS_LIMIT = 1e-4
BF16_LIMIT = 0.05
"""bf16 has 8 bits of mantissa; losses of given responses scatter by some of them."""
OOM_BYTES = 2 * 2**20
"""Left beside the models: less than the first product takes for its workspace."""
APART = "apart, reallocated, offloaded"
LAYOUTS: Mapping[str, Places] = {
    "tp2": {"*": ("node 0", "d1 t2 p1", {})},
    "dp2": {"*": ("node 0", "d2 t1 p1", {"micro_batches": 2}), "actor_generate": ("node 0", "d2 t1 p1", {})},
    "pp2": {"*": ("node 0", "d1 t1 p2", {})},
    APART: {
        "actor_generate": ("node 0", "d1 t2 p1", {}),
        "reward_infer": ("node 0 gpu 1", "d1 t1 p1", {"offload": True}),
        "ref_infer": ("node 0 gpu 1", "d1 t1 p1", {"offload": True}),
        "critic_infer": ("node 0 gpu 1", "d1 t1 p1", {}),
        "actor_train": ("node 0 gpu 0", "d1 t1 p1", {"offload": True}),
        "critic_train": ("node 0 gpu 1", "d1 t1 p1", {"offload": True}),
    },
}


def _against_the_cpu(setting: Setting) -> Iterator[Row]:
    """Four algorithms in fp32 and bf16 on one rank, then PPO in layouts of two, against one rank of the CPU."""
    folder = setting.output / "right"
    plays = {name: _play(folder, name) for name in ALGORITHMS}
    in_bf16 = setting.pick(ALGORITHMS, ("sft",))
    device = [*plays.values(), *(_play(folder, name, dtype="bf16") for name in in_bf16)]
    wanted, found = run_worlds(
        (reference_world(setting), play, list(plays.values()), folder / "reference"),
        (world_of(setting, 1), play, device, folder / "device"),
    )
    for name in ALGORITHMS:
        yield from _compared(f"{name} fp32", found[0][name], wanted[0][name], LOSS_LIMIT)
    for name in in_bf16:
        yield _close(f"{name} bf16", found[0][f"{name} bf16"], wanted[0][name])
    yield from _layouts(setting, wanted[0]["ppo"])


def _layouts(setting: Setting, wanted: Played) -> Iterator[Row]:
    """PPO in layouts of two ranks on the one device; each in a world of its own, so that one failure is one row."""
    folder = setting.output / "right" / "two"
    chosen = {name: LAYOUTS[name] for name in setting.pick(tuple(LAYOUTS), ("tp2", APART))}
    for name, places in chosen.items():
        case = f"ppo fp32, two ranks: {name}"
        try:
            one = _play(folder, "ppo", ranks=2, places=places, name=name)
            both = run_world(world_of(setting, 2), play, [one], folder)
        except (RankFailed, RealplanError) as error:
            yield Row(case=case, verdict="failed", note=str(error))
            continue
        tokens = {**both[0][name].tokens, **both[1][name].tokens}
        yield from _compared(case, replace(both[0][name], tokens=tokens), wanted, LOSS_LIMIT)


def _play(
    folder: Path, algorithm: str, *, ranks: int = 1, places: Places | None = None, dtype: str = "fp32", name: str = ""
) -> Play:
    label = name or (algorithm if dtype == "fp32" else f"{algorithm} {dtype}")
    plan = fixture_plan(algorithm, ranks, places, dtype=dtype)
    return Play(name=label, plan=plan, run=fixture_run(folder, algorithm))


def _compared(case: str, found: Played, wanted: Played, limit: float) -> Iterator[Row]:
    """Tokens identical; every loss, norm and statistic of the algorithm within limit x max(1, value)."""
    if found.error or not found.metrics:
        yield Row(case=case, verdict="failed", note=found.error or "no metrics")
        return
    if wanted.tokens:
        same = sum(found.tokens.get(place) == row for place, row in wanted.tokens.items()) / len(wanted.tokens)
        yield judged(f"{case}: samples with the same tokens", same, "", least=1.0)
    error, key = max(_errors(found.metrics, wanted.metrics))
    yield judged(f"{case}: largest error of a loss", error, "", most=limit, note=key)


def _errors(found: Sequence[Mapping[str, float]], wanted: Sequence[Mapping[str, float]]) -> Iterator[tuple[float, str]]:
    assert len(found) == len(wanted), f"{len(found)} iterations of {len(wanted)}"
    for iteration, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        for key, value in theirs.items():
            # Before the first step a policy is its reference, and which of two equal rewards is larger is rounding.
            tied = iteration == 0 and key == "actor/rewards/accuracies"
            if key.startswith(("actor/", "critic/")) and not tied:
                yield abs(ours[key] - value) / max(1.0, abs(value)), f"{key}, iteration {iteration}"


def _close(case: str, found: Played, wanted: Played) -> Row:
    """Losses and entropies of the first iteration: sampled tokens part ways in bf16, and then nothing can be equal."""
    if found.error or not found.metrics:
        return Row(case=case, verdict="failed", note=found.error or "no metrics")
    names = ("actor/loss", "actor/entropy", "critic/vf_loss")
    errors = [e for e in _errors(found.metrics[:1], wanted.metrics[:1]) if e[1].startswith(names)]
    same = [found.tokens.get(place) == row for place, row in wanted.tokens.items() if place[0] == 0]
    share = f"; {sum(same)} of {len(same)} samples have the same tokens" if same else ""
    error, key = max(errors)
    return judged(f"{case}: largest error of a loss", error, "", most=BF16_LIMIT, note=key + share)


def _experts_and_context(setting: Setting) -> Iterator[Row]:
    """Mixtures of experts, and context parallelism, against the CPU, where this runtime runs them."""
    for case, spec_of, places in (
        ("experts", small_experts, None),
        ("context parallel", lambda: None, {"*": ("node 0", "d1 t1 p1 c2", {})}),
    ):
        try:
            yield from _variant(setting, case, spec_of(), places)
        except (RealplanError, Skip) as reason:
            yield Row(case=case, verdict="skipped", note=f"this runtime does not run it: {str(reason).splitlines()[0]}")


def small_experts() -> ModelSpec:
    """A small mixture of experts with the fixture's vocabulary."""
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 32}
    experts = {"experts": 4, "experts_per_token": 2, "vocab": load_model(str(FIXTURE)).vocab}
    return replace(load_model("qwen3-30b-a3b"), name="experts", **sizes, **experts)


def _variant(setting: Setting, case: str, spec: ModelSpec | None, places: Places | None) -> Iterator[Row]:
    from runtime.models.support import check_supported

    folder = setting.output / "right"
    ranks = 2 if places else 1
    plan = fixture_plan("sft", ranks, places, spec=spec)
    check_supported(plan)
    alone = fixture_plan("sft", 1, spec=spec)
    run = fixture_run(folder, "sft", random=spec is not None)
    wanted, found = run_worlds(
        (reference_world(setting), play, [Play(name=case, plan=alone, run=run)], folder / "variant-cpu"),
        (world_of(setting, ranks), play, [Play(name=case, plan=plan, run=run)], folder / "variant"),
    )
    yield from _compared(case, found[0][case], wanted[0][case], LOSS_LIMIT)


def _moves(setting: Setting) -> Iterator[Row]:
    """Weights between layouts of two ranks, and optimizer state to host memory and back: every bit."""
    for name, wrong in run_world(world_of(setting, 2), moved_weights)[0].items():
        yield judged(f"reallocation {name}: elements that differ", wrong, "", most=0)
    for name, wrong in run_world(world_of(setting, 1), offloaded_state)[0].items():
        yield judged(f"offload of {name}: elements that differ", wrong, "", most=0)


def _captured(setting: Setting) -> Iterator[Row]:
    """Decoding steps recorded as graphs and replayed, against the same steps run one by one."""
    kinds = [("float32", None), ("bfloat16", None), ("bfloat16", small_experts())]
    for dtype, spec in kinds:
        found = run_world(world_of(setting, 1), captured_decode, dtype, spec)[0]
        case = f"captured decode, {'' if spec is None else 'experts, '}{dtype}"
        yield judged(f"{case}: samples with the same tokens", found["same"], "", least=1.0)
        yield judged(f"{case}: largest error of a log-probability", found["error"], "", most=LOSS_LIMIT)


def _experts_in_decoding(setting: Setting) -> Iterator[Row]:
    """Experts in decoding, in bf16, against each expert on the rows that chose it."""
    found = run_world(world_of(setting, 1), experts_together, small_experts())[0]
    how = "one product for all experts" if found["one product"] else "an expert at a time"
    yield judged("experts in decoding: error over the largest number", found["error"], "", most=BF16_LIMIT, note=how)


def _failures(setting: Setting) -> Iterator[Row]:
    """A killed peer and full memory: one line that names rank and step."""
    folder = setting.output / "right"
    run = fixture_run(folder, "ppo")
    killed = Play(name="killed", plan=fixture_plan("ppo", 2), run=run, dies=1)
    found = run_world(world_of(setting, 2), play, [killed], folder / "killed", may_die=True)
    yield _message("a killed peer", found[0]["killed"].error, ("rank 0", "went away"))
    if setting.kind == "cpu":
        yield Row(case="full memory", verdict="skipped", note="a CPU has no limit of its own; the message has a test")
        return
    full = Play(name="full", plan=fixture_plan("ppo"), run=run, limit_bytes=OOM_BYTES)
    found = run_world(world_of(setting, 1), play, [full], folder / "full")
    yield _message("full memory", found[0]["full"].error, ("out of memory",))


def _message(case: str, text: str, words: Sequence[str]) -> Row:
    clear = all(word in text for word in words)
    return Row(case=case, verdict="met" if clear else "failed", note=text or "no error was raised")


CASES = (
    Case("against the CPU", _against_the_cpu),
    Case("captured decode", _captured),
    Case("experts in decoding", _experts_in_decoding),
    Case("moved weights", _moves),
    Case("failures", _failures),
    Case("experts and context", _experts_and_context),
)
