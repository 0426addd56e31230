"""What the leader of several ranks calls the others for (see `distributed`)."""

from typing import Literal, Self

from medloop.nets import Architecture, ServedNetwork
from medloop.vision.prepare import PreparationSpec
from pydantic import BaseModel, ConfigDict

from medloop_trainer.dataset import Material
from medloop_trainer.ranks import Ranks
from medloop_trainer.recipe import Recipe


class Task(BaseModel):
    """All that they must know; the network's weights, and where training stands, come from the leader."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    purpose: Literal["measure", "train"]
    model: str
    dataset_id: str
    preparation: PreparationSpec
    architecture: Architecture
    recipe: Recipe
    compiled: bool
    checkpoint_steps: int

    @classmethod
    def of(
        cls,
        purpose: Literal["measure", "train"],
        material: Material,
        network: ServedNetwork,
        recipe: Recipe,
        *,
        compiled: bool,
        steps: int = 1,
    ) -> Self:
        return cls(
            purpose=purpose,
            model=material.manifest.name,
            dataset_id=material.manifest.id,
            preparation=material.spec,
            architecture=network.architecture,
            recipe=recipe,
            compiled=compiled,
            checkpoint_steps=steps,
        )


def summon(task: Task) -> Ranks:
    """The leader has the others begin with `task` as well, and finds them ready; alone it is itself."""
    ranks = Ranks.present()
    ranks.leaders_text(task.model_dump_json())
    ranks.wait()  # for the one process of each other machine that decodes the images there
    return ranks
