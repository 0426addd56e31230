"""A search as it is called, in a process of its own, as it always is: see `search_story.py`."""

import subprocess
import sys
from pathlib import Path

STORY = Path(__file__).with_name("search_story.py")


def test_a_search_that_is_stopped_goes_on_and_trains_with_what_was_best() -> None:
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(STORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
