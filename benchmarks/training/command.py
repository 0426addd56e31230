"""What the trainer reaches on public sets, what its input, its tracking and its memory cost, and a second process.

    python -m benchmarks.training [--only scores,cutmix,ece,input,tracking,memory,ddp] [--set NAME,…] [--seed 0,1,2]
                                  [--data FOLDER] [--final] [--preset standard] [--minutes 9] [--work FOLDER]
                                  [--repeats 5] [--steps 30] [--images 1000000] [--json FILE]

Scores are those of `val` unless --final lets the test split be read, which is noted with each run. Trainings are kept
in the work folder, one file a run: a command that is stopped goes on where it was. benchmarks/README.md says what each
figure means.
"""

import signal
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from medloop.errors import MedLoopError

from benchmarks.report import arguments, save
from benchmarks.training import tables
from benchmarks.training.bench import Asked, Bench, say
from benchmarks.training.scores import Figures
from benchmarks.training.sets import SETS

PARTS = ("scores", "cutmix", "ece", "input", "tracking", "memory", "ddp")

Part = Callable[[Bench, Asked], Figures]


def main() -> int:
    # As Ctrl-C does: a trainer stores a checkpoint, MLflow is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = _parser().parse_args()
    parts, asked = _names(options.only, PARTS), _asked(options)
    figures: Figures = {}
    with ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = stack.enter_context(Bench(folder))
        try:
            for part in parts:
                compare: Part = import_module(f"benchmarks.training.{part}").compare  # torch only where it is needed
                figures |= compare(bench, asked)
        except MedLoopError as exc:
            say(exc.detail)
            return exc.exit_status
    tables.show(figures)
    save(figures, options.json)
    return 0


def _parser() -> ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("--only", metavar="PART,…", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--set", metavar="NAME,…", default=",".join(SETS), help=f"of {', '.join(SETS)}")
    parser.add_argument("--seed", metavar="N,…", default="", help="0,1,2 by itself, and two more for small sets")
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=Path("../shared/data"), help="with the sets")
    parser.add_argument("--final", action="store_true", help="score on the test split, and note that with the runs")
    parser.add_argument("--preset", choices=("quick", "standard", "best"), default="standard", help="the trainer's")
    parser.add_argument("--minutes", type=float, help="the trainer's budget for one training")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep data sets, runs and MLflow there")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the comparisons of speed")
    parser.add_argument("--steps", type=int, default=30, help="of an epoch whose speed is compared")
    parser.add_argument("--images", type=int, default=1_000_000, help="that memory is simulated with")
    return parser


def _asked(options: Namespace) -> Asked:
    told: dict[str, str | float] = {"preset": options.preset}
    if options.minutes is not None:
        told["budget_minutes"] = options.minutes
    return Asked(
        sets=tuple(_names(options.set, tuple(SETS))),
        data=options.data,
        seeds=tuple(int(seed) for seed in options.seed.split(",")) if options.seed else None,
        final=options.final,
        options=told,
        repeats=options.repeats,
        steps=options.steps,
        images=options.images,
    )


def _names(given: str, known: tuple[str, ...]) -> list[str]:
    names = [name for name in given.split(",") if name]
    if unknown := set(names) - set(known):
        raise SystemExit(f"{', '.join(sorted(unknown))}: choose of {', '.join(known)}.")
    return names
