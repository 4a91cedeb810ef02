"""What a person sees of a run: a line per iteration while it goes, its files, and a summary at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from plans.files import OutputError, write_atomically, writing
from plans.plan import ExecutionPlan
from plans.program import compile_program
from plans.run_output import EVALUATIONS, METRICS, SAMPLES, TIMELINE
from plans.terminal import printable
from runtime.reports.drift import Drift
from runtime.reports.endings import Beyond
from runtime.reports.metrics import TIMING_NAMES, Metrics, MetricsLog
from runtime.reports.records import NewLines, Record, RecordReader, lines_before
from runtime.reports.stats import merge_stats
from runtime.reports.trackers import Trackers
from runtime.reports.watchdog import Watchdog

KL = "actor/reward_kl_penalty"
"""The mean KL to the reference, per token, under verl's name."""
POLL_S = 0.2
LOOK_S = 2.0


class Monitor:
    """Follows the records of all ranks in a thread: writes `metrics.jsonl` and `samples.jsonl`, and on leaving
    `timeline.json`; shows progress on stderr, with a bar on a terminal. earlier: metrics of the iterations that are
    done already. trackers: have the metrics too; watchdog: says where ranks stand still. kl_bound: an iteration whose
    mean KL to the reference is beyond it gets no line, and so no checkpoint; `check` raises Beyond."""

    def __init__(
        self,
        plan: ExecutionPlan,
        iterations: int,
        scratch: Path,
        output: Path,
        earlier: Sequence[Metrics] = (),
        *,
        trackers: Trackers | None = None,
        watchdog: Watchdog | None = None,
        kl_bound: float | None = None,
    ) -> None:
        program = compile_program(plan)
        ranks = tuple(rank for rank in range(plan.cluster.size) if program.projection(rank))
        self._reader = RecordReader(scratch, ranks, len(earlier))
        self._log = MetricsLog(program, output / METRICS, earlier)
        self._timeline = output / TIMELINE
        self._samples = output / SAMPLES
        if os.path.isfile(self._samples):
            write_atomically(self._samples, "".join(lines_before(self._samples, len(earlier))))
        self._ranks = plan.cluster.size
        self._iterations = iterations
        self._trackers, self._watchdog, self._looked_s = trackers, watchdog, 0.0
        self._evaluations = NewLines(output / EVALUATIONS)
        self._drift = Drift(plan)
        self._stop = Event()
        self._kl_bound = kl_bound
        self._failed: OutputError | Beyond | None = None
        self._thread = Thread(target=self._follow, daemon=True)
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        columns = (TextColumn("iterations"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not sys.stderr.isatty(), transient=True)
        self._task = self._bar.add_task("", total=iterations, completed=len(earlier))

    def __enter__(self) -> Monitor:
        self._console.print(f"starting {self._ranks} rank{'s' if self._ranks > 1 else ''}")
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if self._failed is None:
                self._poll()
            if self._log.lines:
                self._log.timeline().save(self._timeline)
        except (OutputError, Beyond) as failed:
            self._failed = self._failed or failed
        self._bar.stop()
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise OutputError where the files of the run cannot be written, Beyond where its KL is beyond the bound."""
        if self._failed is not None:
            raise self._failed

    @property
    def lines(self) -> Sequence[Metrics]:
        """Metrics of the iterations so far."""
        return self._log.lines

    def _follow(self) -> None:
        while self._failed is None and not self._stop.wait(POLL_S):
            try:
                self._poll()
            except (OutputError, Beyond) as failed:  # whoever started the ranks asks for it, and ends them
                self._failed = failed

    def _poll(self) -> None:
        for records in self._reader.poll():
            self._check_kl(records)
            samples = sorted((sample for record in records for sample in record.samples), key=lambda s: s["sample"])
            if samples:
                with writing(self._samples), self._samples.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
            metrics = self._log.add(records)
            if self._trackers is not None:
                self._trackers.log(int(metrics["iteration"]), metrics)
            self._console.print(printable(progress_line(metrics, self._iterations)))
            self._bar.advance(self._task)
            if words := self._drift.add(metrics):
                self._console.print(printable(words))
        if self._trackers is not None:
            for line in self._evaluations.read():
                self._trackers.log(line["iteration"], line)
        if self._watchdog is not None and time.monotonic() - self._looked_s > LOOK_S:
            self._looked_s = time.monotonic()
            for words in self._watchdog.look():
                self._console.print(printable(words))

    def _check_kl(self, records: Sequence[Record]) -> None:
        parts = [record.stats[KL] for record in records if KL in record.stats]
        if self._kl_bound is not None and parts and (kl := merge_stats(parts).mean) > self._kl_bound:
            raise Beyond(records[0].iteration, kl, self._kl_bound)


def progress_line(metrics: Metrics, iterations: int) -> str:
    """One iteration: reward and KL to the reference, or the loss, seconds, and the share of each call."""
    step_s = metrics["timing_s/step"]
    names = [name for name in dict.fromkeys(TIMING_NAMES.values()) if f"timing_s/{name}" in metrics]
    parts = [f"{name} {metrics[f'timing_s/{name}'] / step_s:.0%}" for name in names]
    moved = sum(value for key, value in metrics.items() if key.startswith("timing_s/realloc_"))
    if moved:
        parts.append(f"realloc {moved / step_s:.0%}")
    number = f"{int(metrics['iteration']) + 1:>{len(str(iterations))}}/{iterations}"
    reward, kl = metrics.get("critic/score/mean"), metrics.get(KL)
    learnt = f"  reward {reward:+.3f}  kl {kl:.4f}" if reward is not None and kl is not None else ""
    learnt += "".join(f"  loss {value:.4f}" for key, value in metrics.items() if key.endswith("/loss"))
    for key, value in metrics.items():
        if key.endswith("/skipped_steps"):
            learnt += f"  {value:g} optimizer steps of `{key.removesuffix('/skipped_steps')}` skipped: not finite"
    clipped = metrics.get("critic/score/clip_ratio")
    learnt += f"  ppo.reward_clip changes {clipped:.0%} of the scores" if clipped else ""
    return f"iteration {number}{learnt}  {step_s:.2f} s  ({', '.join(parts)})"


def summary(plan: ExecutionPlan, lines: Sequence[Metrics]) -> list[str]:
    """The reward of the first against the last quarter of a run, and predicted against measured seconds."""
    import pandas as pd  # half a second, which the start of a run does without

    said, table, quarter = list[str](), pd.DataFrame(list(lines)), max(1, len(lines) // 4)
    if "critic/score/mean" in table:
        rewards = table["critic/score/mean"].dropna()
        first, last = rewards.head(quarter).mean(), rewards.tail(quarter).mean()
        said.append(f"reward: first quarter {first:+.3f}, last quarter {last:+.3f} (mean score per sample)")
    if plan.estimate is None or not lines:
        return said
    steady = table.iloc[min(1, len(table) - 1) :].mean(numeric_only=True)  # the first iteration warms up
    said.append(f"{'seconds':<16}{'predicted':>10}{'measured':>10}")
    rows = [(call.name, f"plan/{call.name}/measured_s") for call in plan.workload.graph.calls]
    predicted = {**plan.estimate.calls_s, "iteration": plan.estimate.iteration_s}
    for name, key in [*rows, ("iteration", "timing_s/step")]:
        measured = float(steady.get(key, float("nan")))
        if name in predicted and not isnan(measured):
            said.append(f"{name:<16}{predicted[name]:>10.3f}{measured:>10.3f}")
    peak = float(table.get("plan/peak/measured_gib", pd.Series([float("nan")])).max())
    if not isnan(peak):
        said.append(f"{'peak GiB':<16}{plan.estimate.peak_gib:>10.3f}{peak:>10.3f}  (of the fullest rank)")
    return said
