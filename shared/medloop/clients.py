"""Typed clients of the services, for the command line, the pipeline and the dashboard.

A problem document that a service answers with is raised again as the error it was (`medloop.errors`); a service that
does not answer raises Unavailable, naming its address.
"""

import json
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from medloop import errors
from medloop.auth import ACT_AS_HEADER
from medloop.errors import InvalidRequest, MedLoopError, Unavailable
from medloop.schemas import (
    Approval,
    ApprovalCreate,
    Correction,
    EngineCheckCreate,
    EvaluationCreate,
    EvaluationReport,
    Explanation,
    ExplanationCreate,
    GateCreate,
    GateDecision,
    JobPublic,
    Prediction,
    PredictionBatch,
    PredictionItem,
    RollbackCreate,
    ServedModel,
    TimelineEntry,
)
from medloop.tracing import outgoing

Model = TypeVar("Model", bound=BaseModel)

_KEY = re.compile(r"[!-~]{1,16384}")
_STANDARD_MEMBERS = {"type", "title", "status", "detail", "code", "instance", "request_id"}


def _error_classes(base: type[MedLoopError] = MedLoopError) -> Iterator[type[MedLoopError]]:
    yield base
    for child in base.__subclasses__():
        yield from _error_classes(child)


# A class that shares its parent's code is the parent's own affair.
_BY_CODE = {cls.code: cls for cls in _error_classes() if "code" in vars(cls)}


def error_from(document: Mapping[str, Any]) -> MedLoopError:
    """The error that a problem document speaks of; an unknown code becomes the plain base class."""
    detail = str(document.get("detail", "The service gave no reason."))
    extra = {key: value for key, value in document.items() if key not in _STANDARD_MEMBERS}
    cls = _BY_CODE.get(str(document.get("code")), MedLoopError)
    if cls is errors.InvalidDataset:
        return errors.InvalidDataset(detail, [errors.Issue(**issue) for issue in extra.get("issues", [])])
    return cls(detail, **extra)


class ClientSettings(BaseSettings):
    """`MEDLOOP_API_KEY`: what services are called with."""

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    api_key: SecretStr | None = None


class _Credentials(httpx.Auth):
    """Adds the key to each request, and for whom it is."""

    def __init__(self, key: SecretStr | None, act_as: Callable[[], str | None] | None) -> None:
        text = key.get_secret_value().strip() if key is not None else ""
        if text and not _KEY.fullmatch(text):
            raise InvalidRequest("MEDLOOP_API_KEY has characters that no key has; set it as it was issued.")
        self._key = SecretStr(text)
        self._act_as = act_as

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if key := self._key.get_secret_value():
            request.headers["authorization"] = f"Bearer {key}"
        if self._act_as is not None and (person := self._act_as()):
            request.headers[ACT_AS_HEADER] = quote(person, safe=" @.+-_")
        yield request


def _join_trace(request: httpx.Request) -> None:
    request.headers.update(outgoing())


class _Client:
    """Calls with the key in `MEDLOOP_API_KEY`, if there is one. `act_as` says, at each call, for which person that is,
    where the key has the scope to do so."""

    service = "service"

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        act_as: Callable[[], str | None] | None = None,
    ) -> None:
        self.url = url
        self._http = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(timeout, connect=5.0),
            transport=transport,
            auth=_Credentials(ClientSettings().api_key, act_as),
            event_hooks={"request": [_join_trace]},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def ready(self) -> bool:
        """Whether the service runs and its last self-check passed."""
        try:
            return self._http.get("/readyz", timeout=2.0).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as exc:
            raise self._silent(exc) from exc
        return self._document(response)

    def _document(self, response: httpx.Response) -> Any:
        try:
            document = response.json()
        except ValueError as exc:
            raise self._not_ours(response) from exc
        if response.is_success:
            return document
        if not isinstance(document, dict):
            raise self._not_ours(response)
        raise error_from(document)

    def _silent(self, error: httpx.TransportError) -> Unavailable:
        return Unavailable(
            f"The {self.service} does not answer at {self.url} ({type(error).__name__}). Start it with: medloop up"
        )

    def _not_ours(self, response: httpx.Response) -> Unavailable:
        return Unavailable(
            f"What listens at {self.url} answered {response.status_code}, but not as the {self.service} does."
        )

    def _post(self, path: str, body: BaseModel, answer: type[Model]) -> Model:
        return answer.model_validate(self._call("POST", path, json=body.model_dump(mode="json")))

    def _get(self, path: str, answer: type[Model], **params: Any) -> Model:
        return answer.model_validate(self._call("GET", path, params=params))

    def _list(self, path: str, answer: type[Model], **params: Any) -> list[Model]:
        given = {key: value for key, value in params.items() if value is not None}
        return [answer.model_validate(item) for item in self._call("GET", path, params=given)]


class _JobClient(_Client):
    def job(self, job_id: str) -> JobPublic:
        return self._get(f"/jobs/{job_id}", JobPublic)

    def wait(
        self,
        job: JobPublic,
        *,
        timeout: float = 3600.0,
        interval: float = 0.5,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> JobPublic:
        """Ask until `job` ends, at most `timeout` seconds; a failed one is raised as the error it failed with."""
        deadline = time.monotonic() + timeout
        while job.status in ("queued", "running"):
            if time.monotonic() > deadline:
                raise Unavailable(f"Job {job.id} is still {job.status} after {timeout:.0f} s; ask for it again later.")
            time.sleep(interval)
            job = self.job(job.id)
            if progress and job.progress.get("total"):
                progress(str(job.progress["step"]), int(job.progress["done"]), int(job.progress["total"]))
        if job.status == "failed":
            raise error_from(job.problem or {})
        return job


def _explain(cam: bool) -> dict[str, str]:
    return {"explain": "cam"} if cam else {}


class InferenceClient(_Client):
    """Inference, port 8080."""

    service = "inference service"

    def predict(self, data: bytes, *, cam: bool = False) -> Prediction:
        """Ask about one image file; with `cam` the answer has its class activation map, where the network has one."""
        headers = {"content-type": "application/octet-stream"}
        return Prediction.model_validate(
            self._call("POST", "/v1/predict", content=data, headers=headers, params=_explain(cam))
        )

    def predict_many(self, images: list[bytes], *, cam: bool = False) -> PredictionBatch:
        """Ask about several image files at once; each is answered or refused on its own, in the same order."""
        files = [("files", (f"{i}", data, "application/octet-stream")) for i, data in enumerate(images)]
        return PredictionBatch.model_validate(self._call("POST", "/v1/predict", files=files, params=_explain(cam)))

    def stream(self, images: Sequence[bytes]) -> Iterator[PredictionItem]:
        """Ask about up to 1,000 image files in one request; each is answered or refused on its own as soon as it can
        be, in any order, its `index` being its place in `images`. A busy service is waited for."""
        files = [("images", (f"{i}", data, "application/octet-stream")) for i, data in enumerate(images)]
        try:
            with self._http.stream("POST", "/v1/predict/stream", files=files) as response:
                if not response.is_success:
                    response.read()
                    self._document(response)
                for line in response.iter_lines():
                    document = json.loads(line)
                    if "summary" in document:
                        return
                    yield PredictionItem.model_validate(document)
        except httpx.TransportError as exc:
            raise self._silent(exc) from exc
        except ValueError as exc:
            raise self._not_ours(response) from exc
        raise Unavailable(f"The {self.service} broke off before everything was answered; ask again for the rest.")

    def served_model(self) -> ServedModel:
        return self._get("/v1/model", ServedModel)

    def correct(self, prediction_id: str, *, label: str, author: str, image: bytes, comment: str = "") -> Correction:
        """Store a person's label for a predicted image; once this returns, it is durable."""
        return Correction.model_validate(
            self._call(
                "POST",
                f"/v1/predictions/{prediction_id}/correction",
                data={"label": label, "author": author, "comment": comment},
                files={"image": ("image", image, "application/octet-stream")},
            )
        )

    def corrections(self, *, status: str | None = None, limit: int = 100) -> list[Correction]:
        return self._list("/v1/corrections", Correction, status=status, limit=limit)

    def predictions(self, *, limit: int = 100) -> list[Prediction]:
        return self._list("/v1/predictions", Prediction, limit=limit)


class EvaluatorClient(_JobClient):
    """Evaluator, port 5006."""

    service = "evaluator"

    def evaluate(self, model: str, version: str, split: str = "test") -> JobPublic:
        request = EvaluationCreate.model_validate({"model": model, "version": version, "split": split})
        return self._post("/evaluate", request, JobPublic)

    def report(self, model: str, version: str, split: str = "test") -> EvaluationReport:
        return self._get(f"/reports/{model}/{version}", EvaluationReport, split=split)

    def check_engine(self, model: str, version: str, engine: str, precision: str) -> JobPublic:
        """Start comparing an engine and precision with float32 on ONNX Runtime; the job's result is an
        EngineVerdict."""
        request = EngineCheckCreate(model=model, version=version, engine=engine, precision=precision)
        return self._post("/engines/check", request, JobPublic)

    def gate(self, model: str, version: str) -> GateDecision:
        return self._post("/gate", GateCreate(model=model, version=version), GateDecision)

    def approve(
        self,
        model: str,
        version: str,
        *,
        approver: str,
        bootstrap: bool = False,
        override: str | None = None,
        champion: str | None = None,
    ) -> Approval:
        """Make `version` the champion; `champion` is the one that was seen, and raises Conflict if it is not now."""
        request = ApprovalCreate(
            model=model,
            version=version,
            approver=approver,
            bootstrap=bootstrap,
            override=override,
            champion=champion,
        )
        return self._post("/approvals", request, Approval)

    def rollback(self, model: str, *, approver: str, reason: str = "", champion: str | None = None) -> Approval:
        """Leave `champion`, the one that was seen, for the one before; asking again changes nothing more."""
        request = RollbackCreate(model=model, approver=approver, reason=reason, champion=champion)
        return self._post("/rollback", request, Approval)

    def timeline(self, model: str) -> list[TimelineEntry]:
        return self._list(f"/timeline/{model}", TimelineEntry)


class ExplainerClient(_JobClient):
    """Explainer, port 5005."""

    service = "explainer"

    def explain(
        self, image: bytes, *, model: str, version: str | None = None, target: str | None = None
    ) -> Explanation:
        """Explain the answer to one image file; the champion's unless `version` is given."""
        params = {"model": model, "version": version, "target": target}
        return Explanation.model_validate(
            self._call(
                "POST",
                "/explain",
                content=image,
                headers={"content-type": "application/octet-stream"},
                params={key: value for key, value in params.items() if value is not None},
            )
        )

    def explain_set(self, request: ExplanationCreate) -> JobPublic:
        """Start explaining images of the version's own data set."""
        return self._post("/explanations", request, JobPublic)
