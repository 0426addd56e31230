"""The images as their files describe them; that they build and start is tried where there is an engine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from medloop.settings import DEFAULT_PORTS

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("trainer", "evaluator", "explainer", "inference", "dashboard")
FILES = {name: ROOT / "services" / name / "Dockerfile" for name in SERVICES} | {
    "mlflow": ROOT / "infra" / "mlflow" / "Dockerfile"
}
LIGHT = ("evaluator", "inference", "dashboard")


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str

    @property
    def mounts(self) -> list[dict[str, str]]:
        found = re.findall(r"--mount=(\S+)", self.text)
        return [dict(part.partition("=")[::2] for part in mount.split(",")) for mount in found]

    @property
    def sources(self) -> list[str]:
        """What it takes from the build context."""
        if self.name == "COPY" and "--from=" not in self.text:
            return [part for part in self.text.split()[:-1] if not part.startswith("--")]
        return [mount["source"] for mount in self.mounts if mount["type"] == "bind" and "from" not in mount]


def instructions(image: str) -> list[Instruction]:
    lines = [line for line in FILES[image].read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [Instruction(name, text.strip()) for name, _, text in (line.partition(" ") for line in joined)]


def final(image: str) -> list[Instruction]:
    """The stage that becomes the image, without those it is built on."""
    found = instructions(image)
    start = max(index for index, each in enumerate(found) if each.name == "FROM")
    return found[start:]


def until(image: str, lock: str) -> list[Instruction]:
    """The instructions up to the one that installs `lock`."""
    found = instructions(image)
    end = next(index for index, each in enumerate(found) if f"requirements/{lock}.txt" in each.sources)
    return found[: end + 1]


def only(image: str, name: str) -> str:
    (found,) = [each.text for each in instructions(image) if each.name == name]
    return found


def environment(image: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(each.text for each in final(image) if each.name == "ENV")))


def lint(*files: Path) -> subprocess.CompletedProcess[str]:
    hadolint = Path(sys.executable).with_name("hadolint")
    return subprocess.run([hadolint, *files], capture_output=True, text=True, timeout=60, check=False)


def test_lint_finds_nothing() -> None:
    done = lint(*FILES.values())

    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        ("--no-cache-dir ", "", "DL3042"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ('ENTRYPOINT ["python", "-m", "medloop_inference"]', "ENTRYPOINT python -m medloop_inference", "DL3025"),
    ],
)
def test_lint_finds_a_broken_rule(tmp_path: Path, good: str, bad: str, rule: str) -> None:
    text = FILES["inference"].read_text()
    assert good in text
    broken = tmp_path / "Dockerfile"
    broken.write_text(text.replace(good, bad))

    done = lint(broken)

    assert done.returncode == 1
    assert rule in done.stdout


def test_heavy_layers_are_written_alike() -> None:
    """The same instructions from the first on: an engine then has one layer for all of them."""
    assert all(until(service, "medloop") == until("inference", "medloop") for service in SERVICES)
    assert all(
        until(service, "engine") == until("inference", "engine") for service in SERVICES if service != "dashboard"
    )
    assert until("trainer", "torch") == until("explainer", "torch")
    shared = [each for each in until("inference", "medloop")[:-1] if each.text != "base AS libraries"]
    assert instructions("mlflow")[: len(shared)] == shared


@pytest.mark.parametrize("service", SERVICES)
def test_the_code_of_a_service_comes_last(service: str) -> None:
    """A change of it builds one layer anew: nothing that takes time or room follows."""
    built = [each for each in final(service) if each.name in ("RUN", "COPY")]
    taken = [[mount.get("from") for mount in each.mounts] for each in built]

    assert "service" in taken[-1]
    assert "library" in taken[-2]
    assert not any({"service", "library"} & set(each) for each in taken[:-2])
    own = {source for each in instructions(service) for source in each.sources if source.startswith("services/")}
    assert own == {f"services/{service}"}


@pytest.mark.parametrize("image", FILES)
def test_an_image_runs_as_nobody_and_is_one_process(image: str) -> None:
    assert [each.text for each in final(image) if each.name == "USER"] == ["10001:10001"]
    assert [each.text for each in final(image) if each.name == "WORKDIR"] == ["/home/medloop"]
    assert final(image)[-1].name == "ENTRYPOINT"
    assert json.loads(only(image, "ENTRYPOINT"))[:2] in (["python", "-m"], ["mlflow", "server"])
    assert environment(image)["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


@pytest.mark.parametrize("image", FILES)
def test_an_image_is_told_no_secret_and_no_index(image: str) -> None:
    told = [each.text for each in instructions(image) if each.name in ("ARG", "ENV")]

    assert not re.search(r"secret|password|token|_key|credential", " ".join(told), re.IGNORECASE)
    assert not re.search(r"://|index", " ".join(each.text for each in instructions(image)))


@pytest.mark.parametrize("image", [image for image in FILES if image != "trainer"])
def test_an_image_listens_where_all_expect_it(image: str) -> None:
    name = "MLFLOW_PORT" if image == "mlflow" else "MEDLOOP_PORT"

    assert only(image, "EXPOSE") == environment(image)[name] == str(DEFAULT_PORTS[image])


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server on a free port that answers everything with `status`; with it the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Requests are not written to the tests' output."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("image", "path"), [("inference", "/livez"), ("dashboard", "/_stcore/health")])
@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_tells_well_from_unwell(image: str, path: str, status: int, healthy: bool) -> None:
    command = json.loads(only(image, "HEALTHCHECK").partition("CMD")[2])
    assert command[0] == "python"
    with answering(status) as (port, asked):
        # A proxy in the environment is for what lies outside.
        env = os.environ | {"MEDLOOP_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run([sys.executable, *command[1:]], env=env, capture_output=True, timeout=30, check=False)

    assert (done.returncode == 0) is healthy
    assert asked == [path]


def test_every_server_has_the_same_health_check() -> None:
    checks = {image: only(image, "HEALTHCHECK") for image in FILES}
    assert checks.pop("trainer") == "NONE"
    assert "'/health'" in checks["mlflow"]

    told = {re.sub(r"\w+_PORT|'/\S+'", "…", check) for check in checks.values()}
    assert len(told) == 1


class Context:
    """What `.dockerignore` lets into a build: the last pattern that a path or a folder above it matches decides."""

    def __init__(self, text: str) -> None:
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        self._rules = [(self._expression(line.removeprefix("!")), line.startswith("!")) for line in lines]

    @staticmethod
    def _expression(pattern: str) -> re.Pattern[str]:
        parts = re.split(r"(\*\*/|\*|\[[^]]*])", pattern)
        translated = {"**/": "(?:.*/)?", "*": "[^/]*"}
        exact = "".join(translated.get(part, part if part.startswith("[") else re.escape(part)) for part in parts)
        return re.compile(rf"{exact}(?:/.*)?")

    def __contains__(self, path: str) -> bool:
        return [True, *(keep for rule, keep in self._rules if rule.fullmatch(path))][-1]


CONTEXT = Context((ROOT / ".dockerignore").read_text())


@pytest.mark.parametrize("image", FILES)
def test_what_an_image_takes_exists_and_is_let_in(image: str) -> None:
    sources = {source for each in instructions(image) for source in each.sources}
    assert sources
    for source in sources:
        path = ROOT / source
        files = [path] if path.is_file() else [path / "pyproject.toml"]
        assert all(file.is_file() and str(file.relative_to(ROOT)) in CONTEXT for file in files), source


def test_all_code_is_let_in_and_no_cache() -> None:
    packages = [ROOT / "shared" / "medloop", *(ROOT / "services" / name / f"medloop_{name}" for name in SERVICES)]
    for package in packages:
        files = [path for path in package.rglob("*") if path.is_file()]
        kept = {path for path in files if str(path.relative_to(ROOT)) in CONTEXT}
        assert kept == {path for path in files if "__pycache__" not in path.parts}


@pytest.mark.parametrize(
    "path",
    [
        *(
            ".git/config",
            ".env",
            ".env.prod",
            ".venv/bin/python",
            ".venv-peers/bin/python",
            ".medloop/keys/ed25519.pem",
        ),
        *("tests/conftest.py", "data/image.png", "shared/data/image.png", "mlruns/0/meta.yaml", "docs/api.md"),
        *("services/inference/Dockerfile", "services/inference/.env", "shared/medloop/__pycache__/log.cpython-312.pyc"),
    ],
)
def test_nothing_else_is_let_in(path: str) -> None:
    assert path not in CONTEXT


def pins(lock: str) -> dict[str, set[str]]:
    """Package → its versions with their markers."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(
        r"^([a-z0-9._-]+)==(.*?) \\$", (ROOT / f"requirements/{lock}.txt").read_text(), re.M
    ):
        found.setdefault(name, set()).add(version)
    return found


@pytest.mark.parametrize("service", LIGHT)
def test_light_images_have_no_torch_and_no_full_mlflow(service: str) -> None:
    locks = [Path(source) for each in instructions(service) for source in each.sources if source.endswith(".txt")]
    installed = {name for lock in locks for name in pins(lock.stem)}

    assert {"mlflow-skinny", "pydicom"} <= installed
    assert ("onnxruntime" in installed) is (service != "dashboard")
    assert not installed & {"mlflow", "torch", "torchvision", "triton", "captum", "shap", "onnx"}


@pytest.mark.parametrize("service", SERVICES)
def test_the_layers_of_a_service_agree_on_versions(service: str) -> None:
    """An earlier layer's package that a later one replaced would lie in the image twice."""
    earlier, own = pins("medloop") | pins("engine"), pins(service)
    both = earlier.keys() & own.keys()

    assert len(both) > 50
    assert {name: own[name] for name in both} == {name: earlier[name] for name in both}


def test_an_environment_is_trimmed_of_what_never_runs(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    kept = ["numpy/core.py", "numpy/testing/tool.py", "botocore/data/s3/api.json", "botocore/data/endpoints.json"]
    gone = ["numpy/tests/test_core.py", "numpy/core.pyi", "botocore/data/ec2/api.json", "pyarrow/include/arrow/api.h"]
    for name in (*kept, *gone):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).touch()

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    trim = [ROOT / "requirements" / "trim.sh", tmp_path]
    for _ in range(2):  # layer upon layer
        subprocess.run([*trim, "json", "http.client"], check=True, timeout=30)

    assert {str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()} == set(kept)
    missed = subprocess.run([*trim, "json", "no_such_module"], capture_output=True, timeout=30, check=False)
    assert missed.returncode != 0
    assert b"no_such_module" in missed.stderr
