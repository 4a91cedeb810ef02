"""The distribution of lengths against sums over samples, in the plan file, in what-ifs, and from files."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.explanation.whatif import what_if
from planner.request import build_request
from plans.codec import digest, dump_plan, read_plan
from plans.errors import SpecError
from plans.lengths import MOST_PERCENTILES, Lengths, interpolated, keys_of, percentiles_of
from plans.lengthsfile import lengths_file, recorded
from plans.plan import ExecutionPlan
from plans.workload import Workload

LONGEST = 8192


def lognormal(count: int = 20_000) -> list[int]:
    """Long-tailed lengths of mean some 1,900, cut at the maximum."""
    generator = random.Random(7)
    return [min(LONGEST, max(1, round(generator.lognormvariate(7.2, 0.9)))) for _ in range(count)]


@pytest.mark.parametrize("mean", [1, 500, 2500, 7000])
def test_the_family_of_a_mean_is_an_exponential_cut_at_the_maximum(mean: int) -> None:
    lengths = Lengths(LONGEST, mean)
    assert lengths.mean == mean
    steps = 20_000
    by_quantile = sum(lengths.quantile((i + 0.5) / steps) for i in range(steps)) / steps
    by_share = sum(lengths.beyond((i + 0.5) * LONGEST / steps) for i in range(steps)) * LONGEST / steps
    assert by_quantile == pytest.approx(mean, rel=0.01) and by_share == pytest.approx(mean, rel=0.01)
    # A constant hazard has no memory: as many of those past t go on for another t as of all go past t.
    assert lengths.beyond(2 * mean / 3) == pytest.approx(lengths.beyond(mean / 3) ** 2)


def test_measured_lengths_keep_mean_tail_and_maximum() -> None:
    values = lognormal()
    lengths = Lengths.measured(values, LONGEST)
    assert len(lengths.percentiles) == MOST_PERCENTILES
    assert lengths.mean == pytest.approx(sum(values) / len(values), rel=0.01)
    ordered = sorted(values)
    for share in (0.1, 0.2, 0.5, 0.93, 0.99):
        assert lengths.quantile(share) == pytest.approx(ordered[round(share * (len(ordered) - 1))], rel=0.03)
    for tokens in (200, 1000, 4000):
        assert lengths.beyond(tokens) == pytest.approx(sum(v > tokens for v in values) / len(values), abs=0.02)
    assert (lengths.quantile(0), lengths.quantile(1)) == (ordered[0], ordered[-1])


def test_drawn_lengths_stand_for_the_distribution() -> None:
    lengths = Lengths(LONGEST, 1500)
    drawn = lengths.draw(512, seed=1)
    assert drawn == lengths.draw(512, seed=1) != lengths.draw(512, seed=2)
    assert sum(drawn) / 512 == pytest.approx(1500, rel=0.01)
    assert min(drawn) >= 1 and max(drawn) <= LONGEST
    assert Lengths(16).draw(3) == (16, 16, 16) and Lengths(0).draw(2) == (0, 0)


def test_percentiles_are_lines_between_their_points() -> None:
    """A tenth has at most 20 tokens, half at most 60, all at most 100: by hand, with flat ends."""
    lengths = Lengths(100, 0.0, ((10.0, 20), (50.0, 60), (90.0, 100)))
    assert [lengths.quantile(share) for share in (0, 0.1, 0.3, 0.5, 0.6, 0.9, 1)] == [20, 20, 40, 60, 70, 100, 100]
    assert [lengths.beyond(t) for t in (-1, 19, 20, 40, 60, 80, 99, 100)] == pytest.approx(
        [1, 1, 0.9, 0.7, 0.5, 0.3, 0.11, 0]
    )
    assert lengths.mean == pytest.approx(0.1 * 20 + 0.4 * 40 + 0.4 * 80 + 0.1 * 100)
    short = Lengths(100, 0.0, ((50.0, 30),))
    assert (short.beyond(29), short.beyond(30), short.beyond(31), short.mean) == (1.0, 0.0, 0.0, 30)
    whole = Lengths(100, 0.0, ((0.0, 0), (100.0, 100)))
    assert whole.mean == 50 and whole.quantile(0.25) == 25 and whole.beyond(75) == 0.25
    assert not whole.full and Lengths(100, 0.0).full and Lengths(100, 100).full and not Lengths(100, 90).full


def test_a_point_between_two_numbers_is_numpy_s() -> None:
    for values in ([7], [3, 9], [1, 4, 4, 10], list(range(0, 1000, 7))):
        for share in (0.0, 0.1, 1 / 3, 0.5, 0.99, 1.0):
            assert interpolated(values, share) == pytest.approx(float(np.quantile(values, share)))


@pytest.mark.parametrize("point", [(-1.0, 5), (101.0, 5), (50.0, -1), (50.0, 101)])
def test_a_percentile_off_its_scale(point: tuple[float, int]) -> None:
    with pytest.raises(SpecError, match="the longest has 100"):
        Lengths(100, 0.0, (point,))
    with pytest.raises(SpecError, match="must ascend"):
        Lengths(100, 0.0, ((50.0, 5), (50.0, 6)))
    with pytest.raises(SpecError, match="a mean length of"):
        Lengths(100, -1)


def test_the_same_shape_with_another_mean() -> None:
    shape = Lengths(1000, 0.0, ((0.0, 100), (50.0, 200), (100.0, 700)))
    for mean in (1, 50, 400, 900, 1000):
        scaled = shape.with_mean(mean)
        assert scaled.mean == pytest.approx(mean, rel=0.01, abs=0.5) and scaled.percentiles[-1][1] <= 1000
    assert shape.with_mean(150).percentiles[1][1] == pytest.approx(2 * shape.with_mean(150).percentiles[0][1], abs=1)
    for mean in (-1, 1001):
        with pytest.raises(SpecError, match="mean length"):
            shape.with_mean(mean)
    assert shape.with_mean(0).full and Lengths(1000).with_mean(300) == Lengths(1000, 300)


@pytest.mark.parametrize(("values", "wrong", "largest"), [([5, 101, 3], 101, 101), ([5, -2], -2, 5), ([0, -1], -1, 1)])
def test_measured_lengths_beyond_the_maximum(values: list[int], wrong: int, largest: int) -> None:
    with pytest.raises(SpecError, match=f"a length of {wrong} tokens") as raised:
        Lengths.measured(values, 100)
    assert raised.value.hint == f"a maximum of {largest} tokens"
    assert Lengths.measured([0, 100], 100).mean == pytest.approx(50, abs=0.01)
    with pytest.raises(SpecError, match="no lengths"):
        Lengths.measured([], 100)


def test_samples_of_one_prompt_share_its_length(plan: ExecutionPlan) -> None:
    work = replace(plan.workload, batch_size=64, group_size=4, mean_prompt_tokens=300, mean_response_tokens=200)
    pairs = work.sample_lengths()
    assert len(pairs) == 256
    assert all(len({prompt for prompt, _ in pairs[i : i + 4]}) == 1 for i in range(0, 256, 4))
    assert sum(p for p, _ in pairs) / 256 == pytest.approx(300, rel=0.02)
    assert sum(r for _, r in pairs) / 256 == pytest.approx(200, rel=0.02)


def test_lengths_travel_in_the_plan_and_count_in_its_digest(plan: ExecutionPlan) -> None:
    lengths = Lengths.measured([min(1024, v) for v in lognormal()], 1024)
    measured = replace(plan, workload=replace(plan.workload, response_lengths=lengths.percentiles))
    text = dump_plan(measured)
    assert '"response_lengths": {"p0": ' in text and '"p99.5": ' in text
    again, problems = read_plan(text)
    assert problems == [] and again == measured
    assert digest(measured) != digest(plan)
    assert measured.workload.responses == lengths
    edited, problems = read_plan(text.replace('"p99.5"', '"99.5"'))
    assert edited is None and "`99.5` is not a percentile" in problems[0].message and problems[0].rule == "lengths"


def test_what_if_scales_measured_lengths(plan: ExecutionPlan) -> None:
    lengths = Lengths.measured([min(1024, v // 8 + 1) for v in lognormal()], 1024)
    measured = replace(plan, workload=replace(plan.workload, response_lengths=lengths.percentiles))
    changed = what_if(measured, ["mean_response_tokens=400"]).workload
    assert changed.responses.mean == pytest.approx(400, rel=0.01)
    assert changed.responses.percentiles and not changed.mean_response_tokens
    assert what_if(plan, ["mean_response_tokens=400"]).workload.responses == Lengths(1024, 400)
    with pytest.raises(SpecError, match="the longest has 512"):
        what_if(measured, ["response_tokens=512"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"response_lengths": ((50.0, 700), (100.0, 2000))}, "percentile 100 of the lengths is 2000 tokens"),
        ({"response_lengths": ((50.0, 700), (90.0, 600))}, "must ascend"),
        ({"response_lengths": ((50.0, 700),), "mean_response_tokens": 5}, "leave one of them out"),
        ({"mean_prompt_tokens": 1025}, "mean_prompt_tokens 1025 is above prompt_tokens 1024"),
        (
            {"prompt_lengths": tuple((float(i), i) for i in range(40))},
            "40 percentiles of lengths; it can be at most 33",
        ),
    ],
)
def test_wrong_lengths_are_one_clear_error(plan: ExecutionPlan, sizes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        replace(plan.workload, **sizes)  # type: ignore[arg-type]
    assert message in str(caught.value) and caught.value.hint


def test_percentiles_read_as_they_are_written() -> None:
    found = percentiles_of({"p99": 7, "p50": 3, "p0": 1})
    assert found == ((0.0, 1), (50.0, 3), (99.0, 7)) and keys_of(found) == {"p0": 1, "p50": 3, "p99": 7}
    with pytest.raises(SpecError, match="`p101` is not a percentile"):
        percentiles_of({"p101": 3})


def test_lengths_from_numbers_and_from_metrics(tmp_path: Path) -> None:
    values, path = lognormal(500), tmp_path / "lengths"
    path.write_text("\n".join(map(str, values)) + "\n")
    found = lengths_file(path, prompt_tokens=512, response_tokens=LONGEST)
    assert percentiles_of(found["response_lengths"]) == Lengths.measured(values, LONGEST).percentiles
    lines = [
        {"response_length/p50": 100, "response_length/p100": 900, "prompt_length/mean": 200.4},
        {"response_length/p50": 200, "response_length/p100": 1100, "prompt_length/mean": 100.4},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = lengths_file(path, prompt_tokens=512, response_tokens=LONGEST)
    assert found == {"mean_prompt_tokens": 150, "response_lengths": {"p50": 150, "p100": 1000}}


def test_a_run_records_its_lengths_for_the_next_search(tmp_path: Path) -> None:
    values = lognormal(400)
    kept = recorded([(i % 50, value) for i, value in enumerate(values)])
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 0} | kept) + "\n")
    found = lengths_file(tmp_path, prompt_tokens=512, response_tokens=LONGEST)
    lengths = Lengths(LONGEST, percentiles=percentiles_of(found["response_lengths"]))
    assert lengths.mean == pytest.approx(sum(values) / len(values), rel=0.02)
    assert lengths.quantile(1) == max(values) and found["prompt_lengths"]["p100"] == 49


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("12\n9000\n", ":2:1: a length of 9000 tokens; lengths must be from 0 to the maximum, 8192"),
        ("12\n-1\n", ":2:1: a length of -1 tokens"),
        ("12\nmany\n", ":2:1: `many` is not a whole number"),
        ("1_0\n", ":1:1: `1_0` is not a whole number"),
        ('{"a": 1}\n', ":1:1: no line has `response_length/mean`"),
        ('{"response_length/mean": 5}\n12', ":2:1: not a line of metrics"),
        (
            '{"response_length/mean": 9000}\n',
            ":1:2: response_length/mean is 9000; it must be a number of tokens from 0",
        ),
        ('{"response_length/mean": NaN}\n', ":1:2: response_length/mean is nan; it must be a number"),
        ('{"response_length/p50": 9, "response_length/p50": 9}\n', ":1:28: key `response_length/p50` is given twice"),
        ('{"response_length/p50": 9, "response_length/p25": 10}\n', ":1:1: percentiles of lengths must ascend"),
    ],
)
def test_wrong_files_of_lengths(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lengths"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        lengths_file(path, prompt_tokens=512, response_tokens=LONGEST)
    assert message in caught.value.message and str(path) in caught.value.message and caught.value.hint
    with pytest.raises(SpecError, match="cannot read --lengths"):
        lengths_file(tmp_path / "none", prompt_tokens=512, response_tokens=LONGEST)


def test_a_search_takes_lengths_from_a_file_and_from_a_run_file(tmp_path: Path) -> None:
    path, run = tmp_path / "lengths.txt", tmp_path / "run.yaml"
    path.write_text("10\n20\n30\n")
    run.write_text("workload: {response_tokens: 64, mean_response_tokens: 9, prompt_lengths: {p50: 5, p100: 40}}\n")
    ask = {"models": {"actor": "llama-7b"}, "cluster": "h100-80gb-sxm", "gpus": 8, "gpus_per_node": None, "run": run}
    work = build_request(**ask, sizes={}, lengths=path).workload  # type: ignore[arg-type]
    assert work.responses.mean == pytest.approx(20, rel=0.001) and work.responses.longest == 64
    assert work.prompts.percentiles == ((50.0, 5), (100.0, 40))
    assert build_request(**ask, sizes={}).workload.responses == Lengths(64, 9)  # type: ignore[arg-type]
    assert math.isclose(work.prompts.mean, 0.5 * 5 + 0.5 * 22.5)


def test_a_search_takes_prompt_lengths_from_options(tmp_path: Path) -> None:
    numbers, metrics, run = tmp_path / "prompts.txt", tmp_path / "metrics.jsonl", tmp_path / "run.yaml"
    numbers.write_text("10\n20\n60\n")
    metrics.write_text('{"response_length/mean": 30, "prompt_length/p50": 7, "prompt_length/p100": 9}\n')
    run.write_text("workload: {response_tokens: 64, mean_response_tokens: 9, prompt_lengths: {p50: 5, p100: 40}}\n")

    def work(run: Path | None = run, **words: Any) -> Workload:
        sizes = {key: words.pop(key) for key in list(words) if key.endswith("_tokens")}
        return build_request(models={"actor": "llama-7b"}, gpus=8, run=run, sizes=sizes, **words).workload

    assert work(prompt_lengths=numbers).prompts == Lengths.measured([10, 20, 60], 1024)
    assert work(prompt_lengths=numbers).responses == Lengths(64, 9), "the run file still says responses"
    assert work(mean_prompt_tokens=100).prompts == Lengths(1024, 100), "a mean replaces the run file's percentiles"
    assert work(None, mean_prompt_tokens=100).prompts == Lengths(1024, 100)
    seen = ((50.0, 7), (100.0, 9))
    assert work(prompt_lengths=metrics).prompts.percentiles == seen
    assert work(prompt_lengths=metrics).responses == Lengths(64, 9), "of metrics only the prompts are asked for"
    both = work(lengths=metrics)
    assert (both.prompts.percentiles, both.responses) == (seen, Lengths(64, 30))
    both = work(lengths=metrics, prompt_lengths=numbers)
    assert both.prompts == Lengths.measured([10, 20, 60], 1024) and both.responses == Lengths(64, 30)
    assert work(lengths=metrics, mean_prompt_tokens=8).prompts == Lengths(1024, 8)
    with pytest.raises(SpecError, match=r":3:1: a length of 60 tokens; lengths must be from 0 to the maximum, 50"):
        work(prompt_lengths=numbers, prompt_tokens=50)
    with pytest.raises(SpecError, match="mean_prompt_tokens 100 is above prompt_tokens 50, the longest prompt"):
        work(None, mean_prompt_tokens=100, prompt_tokens=50)
    for words, message in (
        ({"prompt_lengths": numbers, "mean_prompt_tokens": 5}, "and --mean-prompt-tokens: both say how long a prompt"),
        ({"lengths": metrics, "mean_response_tokens": 5}, "and --mean-response-tokens: both say how long a response"),
    ):
        with pytest.raises(SpecError, match=message):
            work(**words)
    numbers.write_text("")
    with pytest.raises(SpecError, match=r"--prompt-lengths .* is empty"):
        work(prompt_lengths=numbers)
    numbers.write_text('{"response_length/mean": 30}')
    with pytest.raises(SpecError, match="no line has `prompt_length/mean` or `prompt_length/p50`"):
        work(prompt_lengths=numbers)
