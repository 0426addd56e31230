"""How much memory the trainer's loop takes beside a bare one, and whether more images take more."""

import subprocess
import sys

from benchmarks.serving.process import ROOT
from benchmarks.training import jpegs, million
from benchmarks.training.bench import Asked, Bench, say
from benchmarks.training.process import FirstSteps, bare_peak, first_steps
from benchmarks.training.scores import Figures

STEPS = 130
"""Two marks and a part: whatever a checkpoint takes is taken twice."""
FEWER = 12_000
_MIB = 2**20


def compare(bench: Bench, asked: Asked) -> Figures:
    say("memory of the loop …")
    bare, ours = bare_peak(STEPS), first_steps(bench, jpegs.version(bench).id, jpegs.NAME, STEPS)
    found = {images: _simulated(bench, images) for images in (FEWER, asked.images)}
    few, many = found[FEWER], found[asked.images]
    return {
        "memory_ratio": ours.peak_bytes / bare,
        "memory_mib.loop": ours.peak_bytes / _MIB,
        "memory_mib.bare": bare / _MIB,
        "memory_million_ratio": many.peak_bytes / few.peak_bytes,
        "memory_mib.million": many.peak_bytes / _MIB,
        "memory_mib.million_opened": many.opened_bytes / _MIB,
        "memory_mib.thousands": few.peak_bytes / _MIB,
        "memory_mib.thousands_opened": few.opened_bytes / _MIB,
        "memory_million_images": asked.images,
        "memory_million_first_step_s": many.first_step,
    }


def _simulated(bench: Bench, images: int) -> FirstSteps:
    """The loop on so many generated images."""
    say(f"memory with {images:,} images …")
    file = bench.folder / "datasets" / f"{million.NAME}-{images}.id"
    if not file.exists():
        # In a process of its own: a million rows take memory.
        module = [sys.executable, "-m", "benchmarks.training.million"]
        command = [*module, bench.objects_url, str(bench.home.cache_dir), str(images)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(done.stdout)
    return first_steps(bench, file.read_text().strip(), million.NAME, STEPS)
