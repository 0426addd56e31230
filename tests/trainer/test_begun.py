"""Which run a launch goes on with: its own, on the same data set version, of which something is left."""

import pytest
from medloop.registry import Registry
from medloop.storage.objects import ObjectStore
from medloop_trainer.begun import begun_run
from medloop_trainer.settings import TrainerSettings
from medloop_trainer.track import create_run


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "MEDLOOP_LAUNCH"])
def test_a_launch_finds_the_run_that_it_began(
    variable: str, registry: Registry, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(launch: str, dataset: str | None = "first") -> str | None:
        monkeypatch.setenv(variable, launch)
        return begun_run(TrainerSettings(), "cells", dataset)

    assert begun("job") is None
    other, own = (create_run(registry, "cells", dataset) for dataset in ("second", "first"))
    for run in (other, own):
        objects.put(f"training/{run}/checkpoint", b"")
    assert (begun("job"), begun("job", None), begun("job", "second"), begun("job", "third")) == (own, own, other, None)
    assert begun("another") is None
    monkeypatch.delenv(variable)
    assert begun_run(TrainerSettings(), "cells", "first") is None

    objects.delete(f"training/{own}/checkpoint")
    assert begun("job") is None, "nothing is left of it"
    assert registry.client.get_run(own).info.status == "KILLED"
    registry.client.set_terminated(other, "FINISHED")
    assert begun("job", "second") is None
    assert registry.client.get_run(other).info.status == "FINISHED"
