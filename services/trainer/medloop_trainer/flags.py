"""Options that several of the trainer's commands share: each is described once."""

from pathlib import Path
from typing import Annotated

from typer import Option

from medloop_trainer.modality import Modality
from medloop_trainer.recipe import Sampling

Resume = Annotated[str | None, Option(help="Go on with this run instead, by its own recipe; `latest` is the newest.")]
BudgetMinutes = Annotated[float | None, Option(help="The longest that training may take, measured once at its start.")]
Architecture = Annotated[str | None, Option(help="By itself: by size.")]
Size = Annotated[int | None, Option(help="Side of the prepared images in px; 64 or less by itself.")]
Epochs = Annotated[int | None, Option(help="By itself: from the number of training images.")]
BatchSize = Annotated[int | None, Option(help="By itself: 64.")]
WarmUp = Annotated[float | None, Option(help="Share of steps in which the learning rate rises.")]
EmaDecay = Annotated[float | None, Option(help="Of the weights' moving average; 0 for none.")]
Patience = Annotated[int | None, Option(help="Epochs without a better one before the end; 0: all.")]
SamplingName = Annotated[Sampling | None, Option(help="How often rare classes are shown.")]
ModalityName = Annotated[Modality | None, Option(help="What may be done to training images.")]
HorizontalFlip = Annotated[bool | None, Option(help="Mirror images: not where left and right differ.")]
WholeShare = Annotated[float | None, Option(help="Last share of epochs without mixing.")]
Pretrained = Annotated[str | None, Option(help="auto, none, or a file of weights.")]
Result = Annotated[Path | None, Option(help="Also write the result there, as JSON.")]
Progress = Annotated[bool | None, Option(help="Show bars; by itself: on a terminal.")]
