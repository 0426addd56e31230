"""`python -m benchmarks.training`."""

import os
import sys

if __name__ == "__main__":
    # As the trainer sets it for itself; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from benchmarks.training.command import main  # here: workers of a peer's loader may import this file, too

    sys.exit(main())
