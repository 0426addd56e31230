"""`python -m benchmarks.serving`."""

import sys

if __name__ == "__main__":
    from benchmarks.serving.command import main  # here: the load generator's process imports this file, too

    sys.exit(main())
