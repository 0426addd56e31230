"""The loop, driven through the stack as people drive it, and then what a stack must survive."""

import base64
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from medloop.clients import InferenceClient
from medloop.errors import MedLoopError
from medloop.vision.encode import encode_png_canonical
from medloop.vision.phantoms import CLASSES, phantom

from tests.deploy.compose.load import Balancer, Load
from tests.deploy.compose.report import Report
from tests.deploy.compose.stack import Stack, answers, docker, healthy, inspect, wait_until
from tests.deploy.compose.stand_ins import train_here

SERVERS = ("mlflow", "evaluator", "explainer", "inference", "dashboard")
MODEL = "phantoms"
PERSON = "journey"
PER_CLASS = 40
SCAN = 768
"""Pixels a side of what throughput is measured with: large enough that the replicas work and the generator does not."""
SIZE = 32  # pixels a side: a training of half a minute on two cores
EPOCHS = 4
UP_SECONDS = 60.0
"""From nothing to healthy, with the images built."""
REQUESTS = 2000
RATE = 40.0
"""Requests a second while something is killed: well below what two halves of a processor answer."""
OUTAGE_SECONDS = 3.0
DRAIN_SECONDS = 3
"""How long a replica that stops still takes connections: twelve looks of the balancer."""
MEASURE_SECONDS = 12.0


@dataclass
class Journey:
    """One pass; every step notes what it found in `report`, and later ones use what earlier ones made."""

    stack: Stack
    report: Report
    absent: tuple[str, ...] = ()
    """Services that the stack runs without."""
    key: str = ""
    image: bytes = b""
    first: str = ""
    """Id of the answer to `image` that is corrected."""
    asked: set[str] = field(default_factory=set)
    """Ids of predictions that were answered."""
    corrected: set[str] = field(default_factory=set)
    """Ids of corrections that were acknowledged."""

    def drive(self) -> None:
        self.start()
        self.train_and_serve()
        self.correct()
        self.compare_replicas()
        self.kill_each()
        self.restart_one_by_one()
        self.kill_inference()
        self.lose_the_records()
        self.count()

    def start(self) -> None:
        """From nothing to healthy, closed to everybody else."""
        began = time.monotonic()
        self.stack.up()
        took = time.monotonic() - began
        self.report.note("from nothing to healthy", f"{took:.0f} s", f"≤ {UP_SECONDS:.0f} s", took <= UP_SECONDS)
        open_doors = [
            fault for name in SERVERS if name not in self.absent for fault in doors(self.stack.container(name))
        ]
        self.report.note("containers as declared", ", ".join(open_doors) or "closed", "closed", not open_doors)
        dashboard, mlflow, inference = (
            self.stack.address(self.stack.container(name), port)
            for name, port in (("dashboard", 8501), ("mlflow", 5000), ("inference", 8080))
        )
        for what, status, wanted in (
            ("dashboard's page", answers(dashboard, "/"), 200),
            ("MLflow's page", answers(mlflow, "/"), 200),
            ("MLflow under a foreign name", answers(mlflow, "/", headers={"Host": "evil.example"}), 403),
            ("inference without a key", answers(inference, "/v1/model"), 401),
            ("inference before there is a champion", answers(inference, "/readyz"), 503),
        ):
            self.report.note(what, str(status), str(wanted), status == wanted)

    def train_and_serve(self) -> None:
        """Data, training, evaluation, a person's approval, an answer: by the command line and the trainer."""
        scopes = "predict,correct,explain,evaluate,approve"
        self.key = self.stack.medloop("keys", "issue", "--name", PERSON, "--scopes", scopes)["key"]
        os.environ["MEDLOOP_API_KEY"] = self.key  # where clients look for it
        folder = draw(self.stack.folder / "scans")
        self.image = (folder / CLASSES[0] / "0.png").read_bytes()
        built = self.stack.medloop("dataset", "build", "/data", "--name", MODEL, volume=f"{folder}:/data:ro")
        began = time.monotonic()
        arguments = ["train", "--dataset-id", built["id"], "--model", MODEL, "--preset", "quick"]
        arguments += ["--size", str(SIZE), "--epochs", str(EPOCHS)]
        version = str(self.train(arguments)["version"])
        where = "on this machine" if "trainer" in self.absent else "in a container"
        self.report.note(
            f"trained {where}", f"version {version}, {time.monotonic() - began:.0f} s", "1", version == "1"
        )
        accuracy = self.stack.medloop("evaluate", MODEL, key=self.key)["metrics"]["accuracy"]["value"]
        self.report.note("evaluated", f"accuracy {accuracy:.2f}", "> 1/6", accuracy > 1 / 6)
        approved = self.stack.medloop("approve", MODEL, version, "--approver", PERSON, key=self.key)
        self.report.note("approved by", approved["approver"], PERSON, approved["approver"] == PERSON)
        with self.inference() as inference:
            took = wait_until(lambda: inference.served_model().model is not None, "inference serves the champion")
            answer = inference.predict(self.image)
        self.first = str(answer.id)
        self.asked.add(self.first)
        self.report.note(
            "answered by",
            f"version {answer.model.version}, after {took:.1f} s",
            version,
            answer.model.version == version,
        )
        self.report.note("the dashboard's key acts for a person", acted := self.acted(), "ann", acted == "ann")

    def train(self, arguments: list[str]) -> dict[str, Any]:
        if "trainer" in self.absent:
            return train_here(self.stack, arguments)
        said = self.stack.compose("run", "--rm", "--no-deps", "-T", "trainer", *arguments, timeout=600)
        found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
        return found

    def acted(self) -> str:
        """Whose correction it is that the dashboard makes for somebody."""
        code = (
            "import base64, os; from medloop.clients import InferenceClient as C; "
            "inference = C(os.environ['MEDLOOP_INFERENCE_URL'], act_as=lambda: 'ann'); "
            f"image = base64.b64decode('{base64.b64encode(self.image).decode()}'); "
            f"said = inference.correct('{self.first}', label='{CLASSES[2]}', author='ann', image=image); "
            "print(said.id, said.author)"
        )
        correction, author = self.stack.compose("exec", "-T", "dashboard", "python", "-c", code).split()
        self.corrected.add(correction)
        return author

    def correct(self) -> None:
        with self.inference() as inference:
            said = inference.correct(self.first, label=CLASSES[0], author=PERSON, image=self.image, comment="as drawn")
        self.corrected.add(str(said.id))
        self.report.note("a correction", said.status, "pending", said.status == "pending")

    def compare_replicas(self) -> None:
        """Two replicas of half a processor against one."""
        halves = {"INFERENCE_CPUS": "0.5", "MEDLOOP_DRAIN_SECONDS": str(DRAIN_SECONDS)}
        self.stack.environment |= halves
        self.stack.up("--no-deps", "--scale", "inference=2", "inference")
        replicas = self.stack.containers("inference")
        self.wait_ready(replicas)
        scan = encode_png_canonical(phantom(CLASSES[0], 0, 0, SCAN))
        rates = [self.throughput(replicas[:count], scan) for count in (1, 2)]
        gain = rates[1] / rates[0]
        found = f"{gain:.2f}× ({rates[0]:.0f} → {rates[1]:.0f} a second)"
        self.report.note("two half-processor replicas against one", found, "≥ 1.8×", gain >= 1.8)

    def throughput(self, replicas: list[str], image: bytes) -> float:
        """Predictions a second in `MEASURE_SECONDS`, with as many callers as keep each replica busy."""
        callers = 8 * len(replicas)
        with self.balanced(replicas) as balancer, Load(balancer, image, self.key, callers=callers) as load:
            time.sleep(2.0)  # until every connection is open
            before, began = len(load.answered), time.monotonic()
            time.sleep(MEASURE_SECONDS)
            rate = (len(load.answered) - before) / (time.monotonic() - began)
        self.asked |= load.answered.keys()
        if load.failed:
            self.report.note("refused while measuring", said(load), "none", False)
        return rate

    def kill_each(self) -> None:
        """Everything but inference, one after the other, under load."""
        everyone = ("mlflow", "postgres", "mongodb", "evaluator", "explainer", "dashboard")
        victims = [name for name in everyone if name not in self.absent]
        with self.loaded() as load:
            for name in victims:
                container = self.stack.container(name)
                self.outage(name, partial(docker, "kill", container), partial(docker, "start", container))
            # The lab's stand-in has its objects in memory, where a kill would lose what a disk keeps.
            s3 = self.stack.container("s3")
            down, up = ("pause", "unpause") if self.stack.lab else ("kill", "start")
            self.outage("s3", lambda: docker(down, s3), lambda: docker(up, s3))
            wait_until(lambda: load.sent >= REQUESTS, f"{REQUESTS} requests")
        how = f"{', '.join(victims)} killed, s3 {down}{'d' if down == 'pause' else 'ed'}"
        self.report.note(how, said(load), f"0 failed of ≥ {REQUESTS}", not load.failed and load.sent >= REQUESTS)
        self.asked |= load.answered.keys()

    def outage(self, name: str, end: Callable[[], str], begin: Callable[[], str]) -> None:
        """One store or service away for a few seconds, while somebody corrects an answer."""
        container = self.stack.container(name)
        end()
        try:
            with self.inference() as inference:
                stored = inference.correct(
                    self.first, label=CLASSES[1], author=PERSON, image=self.image, comment=f"without {name}"
                )
            self.corrected.add(str(stored.id))
        except (MedLoopError, httpx.HTTPError) as exc:
            self.report.console.print(f"  without {name}, a correction is refused: {exc}", highlight=False)
        time.sleep(OUTAGE_SECONDS)
        begin()
        wait_until(lambda: healthy(container), f"{name} is back")

    def restart_one_by_one(self) -> None:
        """Each replica of inference stopped and started under load, until there were enough requests."""
        restarts = 0
        with self.loaded() as load:
            while load.sent < REQUESTS:
                for container in self.stack.containers("inference"):
                    docker("stop", "--time", "40", container)
                    docker("start", container)
                    load.balancer.moved(container, self.stack.address(container))
                    wait_until(partial(load.balancer.is_ready, container), "the replica is ready again")
                    restarts += 1
        found = f"{said(load)}, {restarts} restarts"
        self.report.note("rolling restart of two replicas", found, f"0 failed of ≥ {REQUESTS}", not load.failed)
        self.asked |= load.answered.keys()

    def kill_inference(self) -> None:
        """One replica without a word: what it was asked at that moment fails, and what it answered is not lost."""
        with self.loaded() as load:
            wait_until(lambda: load.sent >= 5 * RATE, "some requests")
            container = self.stack.container("inference")
            docker("kill", container)
            time.sleep(OUTAGE_SECONDS)
            docker("start", container)
            load.balancer.moved(container, self.stack.address(container))
            wait_until(partial(load.balancer.is_ready, container), "the replica is ready again")
        most = int(2 * RATE)
        self.report.note("one replica killed", said(load), f"≤ {most} failed: 2 s of them", load.failed.total() <= most)
        self.asked |= load.answered.keys()

    def lose_the_records(self) -> None:
        """Inference starts anew where no records answer: it serves, and says that it is degraded."""
        if self.stack.lab:
            self.stack.environment["LAB_RECORDS_URL"] = "sqlite:////nowhere/records.sqlite"
            self.stack.up("--no-deps", "--scale", "inference=2", "inference")
        else:
            docker("kill", self.stack.container("mongodb"))
            docker("restart", "--time", "40", *self.stack.containers("inference"))
        replicas = self.stack.containers("inference")
        self.wait_ready(replicas)
        with self.inference() as inference:
            for _ in range(50):
                self.asked.add(str(inference.predict(self.image).id))
            what = sorted(inference.served_model().degraded)
        self.report.note(
            "started without records",
            f"answers; degraded: {', '.join(what) or 'nothing'}",
            "records",
            "records" in what,
        )
        if self.stack.lab:
            del self.stack.environment["LAB_RECORDS_URL"]
            self.stack.up("--no-deps", "--scale", "inference=2", "inference")
        else:
            docker("start", self.stack.container("mongodb"))
        self.wait_ready(self.stack.containers("inference"))

    def count(self) -> None:
        """Everything that was answered or acknowledged is on record."""
        replicas = self.stack.containers("inference")
        waiting = sum(self.metric(one, "medloop_records_waiting") for one in replicas)
        wait_until(
            lambda: not sum(self.metric(one, "medloop_records_waiting") for one in replicas), f"{waiting} records"
        )
        lost = self.asked - self.on_record("predictions")
        self.report.note(
            "predictions on record", f"{len(self.asked) - len(lost)} of {len(self.asked)}", "all", not lost
        )
        forgotten = self.corrected - self.on_record("corrections")
        found = f"{len(self.corrected) - len(forgotten)} of {len(self.corrected)}"
        self.report.note("acknowledged corrections on record", found, "all", not forgotten)

    def on_record(self, kind: str) -> set[str]:
        """Ids of all records of a kind, as a service finds them."""
        code = (
            "import os; from medloop.storage.records import open_records, scan; "
            f"print(*(one.id for one in scan(open_records(os.environ['MEDLOOP_RECORDS_URL']), '{kind}')))"
        )
        return set(self.stack.compose("exec", "-T", "evaluator", "python", "-c", code).split())

    def metric(self, container: str, name: str) -> float:
        address = self.stack.address(container)
        answer = httpx.get(f"http://{address}/metrics", headers={"Authorization": f"Bearer {self.key}"}, timeout=10)
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", answer.text, re.MULTILINE))

    def wait_ready(self, replicas: list[str]) -> None:
        for one in replicas:
            wait_until(partial(self.is_ready, one), "inference is ready")

    def is_ready(self, replica: str) -> bool:
        return answers(self.stack.address(replica), "/readyz") == 200

    @contextmanager
    def inference(self) -> Iterator[InferenceClient]:
        """A client of the first replica, with the journey's key."""
        address = self.stack.address(self.stack.container("inference"))
        with InferenceClient(f"http://{address}") as client:
            yield client

    @contextmanager
    def balanced(self, replicas: list[str]) -> Iterator[Balancer]:
        balancer = Balancer({one: self.stack.address(one) for one in replicas})
        try:
            yield balancer
        finally:
            balancer.close()

    @contextmanager
    def loaded(self) -> Iterator[Load]:
        balanced = self.balanced(self.stack.containers("inference"))
        with balanced as balancer, Load(balancer, self.image, self.key, rate=RATE) as load:
            yield load


def draw(folder: Path) -> Path:
    """Class folders of small phantoms, which any user of a container may read."""
    shutil.rmtree(folder, ignore_errors=True)
    for label in CLASSES:
        (folder / label).mkdir(parents=True)
        for index in range(PER_CLASS):
            (folder / label / f"{index}.png").write_bytes(encode_png_canonical(phantom(label, index, 0, 2 * SIZE)))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def doors(container: str) -> list[str]:
    """What a running container has that the stack's file promises it has not."""
    found = inspect(container)
    host, name = found["HostConfig"], found["Name"].lstrip("/")
    published = [one["HostIp"] for ports in (host["PortBindings"] or {}).values() for one in ports]
    checks = {
        "a root that can be written to": not host["ReadonlyRootfs"],
        "capabilities": host["CapDrop"] != ["ALL"] or bool(host["CapAdd"]),
        "new privileges": "no-new-privileges:true" not in (host["SecurityOpt"] or []),
        "root": found["Config"]["User"] != "10001:10001",
        "a port for everybody": any(address != "127.0.0.1" for address in published),
        "no limit of memory": not host["Memory"],
    }
    return [f"{name} has {what}" for what, is_so in checks.items() if is_so]


def said(load: Load) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in load.failed.most_common(4))
    return f"{load.failed.total()} failed of {load.sent:,}{f' ({reasons})' if reasons else ''}"
