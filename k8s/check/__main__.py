"""`python -m k8s.check`: say what is wrong with the manifests, one sentence a line; status 1 when something is.

`--out FOLDER` also writes what was rendered, for other tools to look at.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from k8s.check import arrows, pods, references, schema
from k8s.check.render import OVERLAYS, CannotCheck, Document, copied, documents, find_kubectl, render_all


def faults(what: str, found: list[Document]) -> Iterator[str]:
    """Everything that is wrong with one rendering; `what` is its name by `render_all`."""
    for document in found:
        yield from schema.faults(document)
    yield from pods.faults(found)
    yield from references.faults(found)
    yield from arrows.faults(found, _designed(what))


def _designed(what: str) -> set[arrows.Arrow]:
    overlay = next(name for name in OVERLAYS if what.endswith(name))
    if what.startswith("all components"):
        return arrows.designed(overlay, arrows.COMPONENTS)
    return arrows.designed(overlay, [what.removeprefix("components/").partition(" ")[0]])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m k8s.check", description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder to write what was rendered to")
    out: Path | None = parser.parse_args().out
    try:
        with copied() as copy:
            rendered = render_all(find_kubectl(), copy)
    except CannotCheck as exc:
        sys.stderr.write(f"{exc}\n")
        return 2
    wrong = 0
    for what, text in rendered.items():
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{what.replace('/', '-').replace(' ', '-')}.yaml").write_text(text)
        found = documents(text)
        told = sorted(set(faults(what, found)))
        wrong += len(told)
        sys.stdout.write(f"{what}: {len(found)} documents, {len(told) or 'no'} fault{'s'[: len(told) != 1]}\n")
        sys.stdout.writelines(f"  {each}\n" for each in told)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
