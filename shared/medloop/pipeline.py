"""The loop: train → evaluate → explain → gate → (a person approves) → champion.

Called by the command line, a Job or a scheduler. The trainer runs as a process; the other services are spoken to over
HTTP. Every step's result is kept in a record, so a pipeline that was cut off goes on where it stopped, and a step that
is done is not done twice.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medloop.clients import EvaluatorClient, ExplainerClient, InferenceClient
from medloop.data.parallel import ProgressFn
from medloop.errors import Conflict, MedLoopError, TrainingFailed, Unavailable
from medloop.registry import CHALLENGER, CHAMPION, Registry
from medloop.schemas import ExplanationCreate, new_id
from medloop.storage.records import RecordStore

EXPLAINED_IMAGES = 6
"""How many test images the pipeline has explained: enough to look at, and a few seconds on two cores."""
SERVE_SECONDS = 60.0
BOOTSTRAP_APPROVER = "bootstrap"


@dataclass
class Training:
    """What the trainer is asked for: a data set version, the model's name, options of its command line, and which of
    its commands: `retrain` goes on from the champion's weights."""

    dataset_id: str
    model: str
    options: Mapping[str, str | int | float] = field(default_factory=dict)
    verb: Literal["train", "retrain", "search"] = "train"

    def arguments(self, result: Path) -> list[str]:
        arguments = [self.verb, "--dataset-id", self.dataset_id, "--model", self.model, "--result", str(result)]
        for name, value in self.options.items():
            arguments.append(f"--{name.replace('_', '-')}")
            if value is not True:  # a flag has no value
                arguments.append(str(value))
        return arguments


@dataclass
class Reproducing:
    """A run whose training is to be done again, and where the weights lie that it began with, if a file held them."""

    run_id: str
    pretrained: Path | None = None

    def arguments(self, result: Path) -> list[str]:
        where = [] if self.pretrained is None else ["--pretrained", str(self.pretrained)]
        return ["reproduce", self.run_id, "--result", str(result), *where]


def run_trainer(asked: Training | Reproducing, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Have the trainer work in a process of its own, on this terminal; returns what it says it made.

    Raises the error whose exit status the trainer ended with.
    """
    with tempfile.TemporaryDirectory(prefix="medloop-") as folder:
        result = Path(folder) / "result.json"
        process = subprocess.Popen(  # noqa: S603 - our own command line
            [sys.executable, "-m", "medloop_trainer", *asked.arguments(result)],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            status = process.wait()
        except BaseException:
            # Ctrl-C reached the trainer too; another reason to stop did not.
            process.terminate()
            process.wait()
            raise
        document: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    if status == 0 and document:
        return document
    raise _trainer_error(status)


def _trainer_error(status: int) -> MedLoopError:
    known = {cls.exit_status: cls for cls in _subclasses(MedLoopError) if cls.exit_status not in (1, 2)}
    cls = known.get(status, TrainingFailed)
    return cls(f"The trainer stopped with exit status {status}; its last lines above say why.")


def _subclasses(base: type[MedLoopError]) -> list[type[MedLoopError]]:
    # Deepest first, so that the dictionary above ends with the broadest class of each exit status.
    return [c for child in base.__subclasses__() for c in _subclasses(child)] + [base]


class Pipeline:
    """One pass of the loop for one model, resumable through its record (kind `pipelines`)."""

    def __init__(
        self,
        *,
        records: RecordStore,
        registry: Registry,
        addresses: Mapping[str, str],
        training: Training,
        environment: Mapping[str, str] | None = None,
        progress: ProgressFn | None = None,
    ) -> None:
        self.records = records
        self.registry = registry
        self.addresses = addresses
        self.training = training
        self.environment = environment
        self.progress = progress
        self.id, self.revision, self.document = self._open()

    @property
    def resumed(self) -> bool:
        """Whether steps of this pass were done before."""
        return bool(self.document["steps"])

    def step(self, name: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step: the one on record, or that of `action`, which is then put on record."""
        steps = self.document["steps"]
        if name not in steps:
            started = time.monotonic()
            result = action()
            steps[name] = {"result": result, "seconds": round(time.monotonic() - started, 3)}
            self._save()
        result = steps[name]["result"]
        assert isinstance(result, dict)  # noqa: S101 - this method alone writes it
        return result

    @property
    def seconds(self) -> dict[str, float]:
        return {name: step["seconds"] for name, step in self.document["steps"].items()}

    def train(self) -> dict[str, Any]:
        return self.step("train", lambda: run_trainer(self.training, self.environment))

    def evaluate(self) -> dict[str, Any]:
        """The evaluation report of the new version on the test split."""
        model, version = self._version()

        def action() -> dict[str, Any]:
            with EvaluatorClient(self.addresses["evaluator"]) as evaluator:
                evaluator.wait(evaluator.evaluate(model, version), progress=self.progress)
                return evaluator.report(model, version).model_dump(mode="json", exclude={"worst"})

        return self.step("evaluate", action)

    def explain(self) -> dict[str, Any]:
        """Explanations of some test images, as artifacts of the version's run."""
        model, version = self._version()

        def action() -> dict[str, Any]:
            request = ExplanationCreate(model=model, version=version, images=EXPLAINED_IMAGES)
            with ExplainerClient(self.addresses["explainer"]) as explainer:
                return explainer.wait(explainer.explain_set(request), progress=self.progress).result or {}

        return self.step("explain", action)

    def gate(self) -> dict[str, Any]:
        model, version = self._version()

        def action() -> dict[str, Any]:
            with EvaluatorClient(self.addresses["evaluator"]) as evaluator:
                return evaluator.gate(model, version).model_dump(mode="json")

        return self.step("gate", action)

    def bootstrap(self) -> dict[str, Any]:
        """Approve the first champion, signed as `bootstrap`; where there is one already, leave it to a person.

        Returns the alias that the new version has now.
        """
        model, version = self._version()

        def action() -> dict[str, Any]:
            with EvaluatorClient(self.addresses["evaluator"]) as evaluator:
                if self.registry.at_alias(model, CHAMPION) is not None:
                    return {"alias": CHALLENGER}
                evaluator.approve(model, version, approver=BOOTSTRAP_APPROVER, bootstrap=True)
            return {"alias": CHAMPION}

        return self.step("approve", action)

    def finish(self) -> None:
        self.document["status"] = "succeeded"
        self._save()

    def _version(self) -> tuple[str, str]:
        trained = self.train()
        return str(trained["model"]), str(trained["version"])

    def _open(self) -> tuple[str, int, dict[str, Any]]:
        """The newest unfinished pass for the same inputs, or a new one."""
        inputs: dict[str, Any] = {"dataset_id": self.training.dataset_id, "options": dict(self.training.options)}
        if self.training.verb != "train":
            inputs["verb"] = self.training.verb
        where = {"model": self.training.model, "status": "running"}
        for record in self.records.find("pipelines", where, limit=10).items:
            if record.document["inputs"] == inputs and self._still_registered(record.document):
                return record.id, record.revision, record.document
        document = {"model": self.training.model, "status": "running", "inputs": inputs, "steps": {}}
        pipeline_id = new_id()
        self.records.put_once("pipelines", pipeline_id, document)
        return pipeline_id, 1, document

    def _still_registered(self, document: dict[str, Any]) -> bool:
        trained = document["steps"].get("train")
        if trained is None:
            return True
        found = self.registry.at_alias(self.training.model, CHALLENGER)
        return found is not None and found.version == trained["result"]["version"]

    def _save(self) -> None:
        if not self.records.compare_and_set("pipelines", self.id, self.revision, self.document):
            raise Conflict("Another process is running the same pipeline; wait for it to end.")
        self.revision += 1


def wait_until_served(address: str, version: str, timeout: float = SERVE_SECONDS) -> None:
    """Wait until inference answers with `version`; raises Unavailable with its reasons when it does not."""
    deadline = time.monotonic() + timeout
    with InferenceClient(address) as inference:
        while True:
            served = inference.served_model()
            if served.model is not None and served.model.version == version:
                return
            if time.monotonic() > deadline:
                reasons = "; ".join(f"version {r.version}: {r.reason}" for r in served.refused) or "no reason given"
                raise Unavailable(f"Inference does not serve version {version} after {timeout:.0f} s ({reasons}).")
            time.sleep(0.2)
