"""A search whose trainings are a formula, so that processes of it start and end in a second or two.

`python searcher.py URL FOLDER ME OTHER TRIALS LAST` works on the study until it has so many trials. In its first two
trials it waits until OTHER is at as many; it is killed in its LASTth. Nobody misses it within the time that a test
takes: the test puts its last sign of life back.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from medloop.vision.prepare import PreparationSpec
from medloop_trainer.attempt import Attempt
from medloop_trainer.recipe import Options, Recipe
from medloop_trainer.space import Space, point_of
from medloop_trainer.stop import Stop
from medloop_trainer.study import Bound, Study, open_study

EPOCHS = 4
RECIPE = Recipe.settle(Options(preset="quick"), architecture="small-resnet", size=28, images=400, pretrained=None)
PATIENCE = 120.0
"""Seconds that a process waits for the other one."""
BOUND = Bound(
    model="phantoms",
    dataset_id="d" * 64,
    preparation=PreparationSpec(mode="L", size=28),
    space=Space.around(RECIPE, 400),
    trial={"preset": "quick"},
)


def open_tiny(
    url: str,
    *,
    bound: Bound = BOUND,
    make_run: Callable[[], str] = lambda: "run",
    mourn: Callable[[str], object] = lambda _: None,
) -> Study:
    start = point_of(RECIPE)
    return open_study(url, "tiny", bound, start=start, first_look=1, make_run=make_run, mourn=mourn)


def learn(attempt: Attempt, loss: float = 0.5) -> float:
    for epoch in range(1, EPOCHS + 1):
        attempt.judge(epoch, 1 + loss - epoch / 100, last=epoch == EPOCHS)
    return loss


def main(url: str, folder: Path, me: str, other: str, trials: int, last: int) -> None:
    begun = 0

    def train(attempt: Attempt) -> float:
        nonlocal begun
        begun += 1
        attempt.note(worker=me, run_id=f"run-of-{me}")
        (folder / f"{me}-{begun}").touch()
        end = time.monotonic() + PATIENCE
        while begun <= 2 and not (folder / f"{other}-{begun}").exists():
            if time.monotonic() > end:
                raise TimeoutError(f"{other} did not come to its trial {begun}")
            time.sleep(0.01)
        if begun == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(attempt)

    def make_run() -> str:
        (folder / f"made-by-{me}").touch()
        return f"parent-of-{me}"

    def mourn(run_id: str) -> None:
        (folder / f"mourned-{run_id}").touch()

    open_tiny(url, make_run=make_run, mourn=mourn).work(train, trials=trials, stop=Stop())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
