"""What a prediction costs, read from the tables of benchmarks/README.md, so that there is one place for each figure."""

import re
from dataclasses import dataclass
from pathlib import Path

from medloop_inference.batcher import LIGHT_S

README = Path(__file__).parents[1] / "README.md"

CLIENTS = 16
"""Of the tables that a loaded server's figures are taken from."""
TOGETHER = 8
"""Images of a batch at 16 clients, assumed, since the tables do not have it: two runs at once on two processors share
them, and the event loop answers about as many of a light network's in one turn (4 ms)."""


@dataclass(frozen=True, slots=True)
class Network:
    """What one network costs, in seconds of processor time a request: `alone` when one comes at a time, `together`
    when 16 clients ask. `embedding` is its number of dimensions, `colours` and `size` those of its images."""

    name: str
    alone: float
    together: float
    embedding: int
    size: int
    colours: int

    def batch_s(self, images: int) -> float:
        """Processor time of a batch. Linear between the two measured figures; beyond them an image never costs less
        than was measured."""
        fixed = max(0.0, (self.alone - self.together) * TOGETHER / (TOGETHER - 1))
        return max(fixed + images * (self.alone - fixed), images * self.together)

    def at_once(self, cpus: float) -> int:
        """Batches that a pod works on at once. A light network is answered in the event loop's thread alone."""
        return 1 if self.together < LIGHT_S else max(1, int(cpus))


def networks(readme: Path = README) -> dict[str, Network]:
    """The light and the heavy network of the serving benchmark."""
    text = readme.read_text()

    def network(name: str, embedding: int, size: int, colours: int) -> Network:
        alone, together = (cpu_ms(text, name, clients) / 1000 for clients in (1, CLIENTS))
        return Network(name, alone, together, embedding, size, colours)

    # Embeddings as benchmarks/serving/peers/net.py builds them.
    return {each.name: each for each in (network("tiny64", 64, 64, 1), network("resnet18_224", 512, 224, 3))}


def cpu_ms(text: str, name: str, clients: int) -> float:
    """Our row of the table that is headed `name, clients`; raises ValueError where there is none."""
    heading = rf"^\| {name}, {clients} clients? \|.*\n\|[-| ]+\n"
    found = re.search(heading + r"(?:\|.*\n)*?\| medloop \| ([0-9.,]+) \|", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"benchmarks/README.md has no table for {name} with {clients} clients.")
    return float(found[1].replace(",", ""))


def ready_s(readme: Path = README) -> float:
    """Seconds from the start of inference to `/readyz` 200."""
    found = re.search(r"^`ready_seconds` ([0-9.]+)", readme.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError("benchmarks/README.md does not say how long inference takes to be ready.")
    return float(found[1])
