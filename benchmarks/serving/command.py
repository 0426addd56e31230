"""Our inference service beside the servers that people would otherwise put a model behind.

    python -m benchmarks.serving [--only cpu,saturated,memory,overload,swaps] [--peers fastapi,litserve,…]
                                 [--models tiny64,resnet18_224] [--repeats 5] [--seconds 5] [--threads 1]
                                 [--work FOLDER] [--json FILE]

All on loopback, one server at a time, all with the same networks, images and threads; answers are compared before
anything is timed. CPU is that of a server's whole process tree, memory too. benchmarks/README.md says what each figure
means.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.report import arguments, save
from benchmarks.serving import cpu, memory, overload, saturated, swaps, tables
from benchmarks.serving.bench import MODELS, Bench, chosen
from benchmarks.serving.servers import LOWER, PEERS, Kind

Part = Callable[[Bench, list[Kind], int, float], dict[str, float]]

PARTS: dict[str, Part] = {
    "cpu": cpu.compare,
    "saturated": saturated.compare,
    "memory": memory.compare,
    "overload": overload.compare,
    "swaps": swaps.compare,
}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", metavar="PART,…", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--peers", metavar="NAME,…", default=",".join(PEERS), help=f"of {', '.join(PEERS)}, and {LOWER}"
    )
    parser.add_argument("--models", metavar="NAME,…", default=",".join(MODELS), help="of the CPU comparison")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the comparisons")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--threads", type=int, default=1, help="of one run of every server's engine; 1 costs all least")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep networks there for the next run")
    options = parser.parse_args()
    parts, peers = _names(options.only, list(PARTS)), _names(options.peers, [*PEERS, LOWER])
    kinds = chosen(peers)
    for name in set(peers) - {kind.name for kind in kinds}:
        sys.stderr.write(f"{name} is not installed and left out; make bench-peers installs it.\n")
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = stack.enter_context(Bench(folder.resolve(), options.threads, _names(options.models, list(MODELS))))
        for part in parts:
            sys.stderr.write(f"{part} …\n")
            figures |= PARTS[part](bench, kinds, options.repeats, options.seconds)
    tables.show(figures)
    save(figures, options.json)
    return 0


def _names(given: str, known: list[str]) -> list[str]:
    names = [name for name in given.split(",") if name]
    if unknown := set(names) - set(known):
        raise SystemExit(f"{', '.join(sorted(unknown))}: choose of {', '.join(known)}.")
    return names
