"""What one GPU can show about realplan: right results, ceilings, training, decode, kernels, memory, whole
iterations, profiles.

    scripts/gpu_check.sh [STAGE ...] [--device cuda|cpu] [--tiny] [--backend gloo|nccl] [--minutes 8] [--output FOLDER]

Every stage runs in a process of its own under a time limit; its figures are in `gpu_check.json` as soon as it ends,
also when it was killed. `--device cpu --tiny` rehearses all stages on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_check.report import Report
from gpu_check.setting import Setting
from gpu_check.stages import BY_NAME, STAGES, Stage, run_stage
from runtime.launching.entry import rank_defaults

START_S = 180.0
"""In which a process must have imported everything, on a slow disk too."""
PRELOAD = ["gpu_check.preload"]


def main() -> int:
    """Run the stages; 0 when none failed, 1 otherwise. Goals that were missed are figures, not failures."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the table is written all the same
    for name, value in rank_defaults(cpu=options.device == "cpu").items():  # as in the ranks of a run
        os.environ.setdefault(name, value)
    output: Path = options.output.resolve()
    shutil.rmtree(output / "stages", ignore_errors=True)
    (output / "stages").mkdir(parents=True)
    setting = Setting(kind=options.device, tiny=options.tiny, backend=options.backend, output=output)
    report = Report(setting, output / "gpu_check.json")
    chosen = [BY_NAME[name] for name in options.stages] if options.stages else list(STAGES)
    try:
        _run(chosen, setting, report, time.monotonic() + 60 * options.minutes, options.limit)
    finally:
        report.show()
        print(f"wrote {report.path}", file=sys.stderr)
    return 1 if report.failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(BY_NAME)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="fixture-sized shapes: a rehearsal")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo", help="of two ranks on the one card")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds per stage (default: each stage's own)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"))
    options = parser.parse_args()
    unknown = [name for name in options.stages if name not in BY_NAME]
    if unknown:
        parser.error(f"no stage `{unknown[0]}`; one of {', '.join(BY_NAME)}")
    return options


def _run(chosen: list[Stage], setting: Setting, report: Report, end_s: float, limit_s: float) -> None:
    """Stages in turn; the next one's process imports while the present one works, which costs a card minutes else."""
    context = _context(setting)
    ahead: list[_Running] = []
    try:
        for index, stage in enumerate(chosen):
            running = ahead.pop() if ahead else _Running(context, stage, setting, limit_s, end_s)
            if index + 1 < len(chosen):
                ahead.append(_Running(context, chosen[index + 1], setting, limit_s, end_s))
            print(f"{stage.name} ...", file=sys.stderr, flush=True)
            running.finish(report, end_s)
    finally:
        for running in ahead:
            running.kill()


def _context(setting: Setting) -> Any:
    """CUDA does not survive a fork; on the CPU a server imports once and forks, as it does for `realrun`."""
    if setting.kind == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class _Running:
    """A stage's process."""

    def __init__(self, context: Any, stage: Stage, setting: Setting, limit_s: float, end_s: float) -> None:
        self.stage = stage
        self.path = setting.output / "stages" / f"{stage.name}.jsonl"
        self.limit_s = min(limit_s or stage.limit_s, max(end_s - time.monotonic(), 1.0))
        self._ready, self._begin = context.Event(), context.Event()
        words = (stage.name, setting, self.path, self._ready, self._begin, self.limit_s)
        self._process = context.Process(target=run_stage, args=words)
        self._process.start()

    def finish(self, report: Report, end_s: float) -> None:
        """Let it work until it ends or its time is over; its rows go into the report, whatever happens."""
        self._ready.wait(min(START_S, max(end_s - time.monotonic(), 1.0)))
        began = time.monotonic()
        limit_s = min(self.limit_s, max(end_s - began, 1.0))
        end = "the run was stopped"
        self._begin.set()
        try:
            self._process.join(limit_s)
            end = ""
            if self._process.exitcode is None:
                end = f"killed after {limit_s:.0f} s, its time limit"
            elif self._process.exitcode:
                end = f"its process ended with exit code {self._process.exitcode}"
        finally:
            self.kill()
            report.take(self.stage, self.path, time.monotonic() - began, limit_s, end)

    def kill(self) -> None:
        """End the process and its ranks."""
        pid = self._process.pid
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self._process.join()


if __name__ == "__main__":
    raise SystemExit(main())
