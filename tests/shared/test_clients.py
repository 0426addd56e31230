import logging

import httpx
import pytest
from medloop.clients import ClientSettings, EvaluatorClient, InferenceClient, error_from
from medloop.errors import (
    Conflict,
    InvalidDataset,
    InvalidRequest,
    MedLoopError,
    Unauthenticated,
    Unavailable,
    UntrustedModel,
)
from medloop.http import problem
from medloop.schemas import JobPublic, now
from medloop.testing import free_port


def job(status: str, **changes: object) -> JobPublic:
    fields = {"id": "j", "type": "evaluate", "status": status, "created_at": now(), "updated_at": now()}
    return JobPublic.model_validate({**fields, **changes})


def answering(*answers: httpx.Response) -> httpx.MockTransport:
    left = list(answers)
    return httpx.MockTransport(lambda _: left.pop(0) if len(left) > 1 else left[0])


@pytest.mark.parametrize("error", [Conflict("Somebody was quicker."), UntrustedModel("A byte differs.", digest="d")])
def test_an_error_survives_the_way_over_http(error: MedLoopError) -> None:
    response = httpx.Response(error.status, json=problem(error).model_dump(mode="json"))
    with InferenceClient("http://x", transport=answering(response)) as client, pytest.raises(type(error)) as caught:
        client.served_model()
    assert (caught.value.detail, caught.value.extra) == (error.detail, error.extra)


def test_the_issues_of_a_data_set_survive_too() -> None:
    issues = [{"kind": "unreadable", "where": "a.png", "detail": "truncated"}]
    error = error_from({"code": "invalid-dataset", "detail": "Wrong.", "issues": issues})
    assert isinstance(error, InvalidDataset)
    assert error.issues[0].where == "a.png"


def test_a_service_that_does_not_answer_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with EvaluatorClient(url) as client:
        assert not client.ready()
        with pytest.raises(Unavailable, match=rf"evaluator does not answer at {url}.*medloop up"):
            client.report("m", "1")


def test_an_answer_that_is_no_problem_document_is_unavailable() -> None:
    with (
        InferenceClient("http://x", transport=answering(httpx.Response(502, text="<html>"))) as client,
        pytest.raises(Unavailable, match="answered 502"),
    ):
        client.served_model()


def test_waiting_tells_progress_and_ends_with_the_job() -> None:
    running = job("running", progress={"step": "predict", "done": 3, "total": 9})
    answers = [
        httpx.Response(200, json=j.model_dump(mode="json")) for j in (running, job("succeeded", result={"a": 1}))
    ]
    told: list[tuple[str, int, int]] = []
    with EvaluatorClient("http://x", transport=answering(*answers)) as client:
        done = client.wait(job("queued"), interval=0, progress=lambda *values: told.append(values))
    assert done.result == {"a": 1}
    assert told == [("predict", 3, 9)]


def test_a_failed_job_is_raised_as_what_it_failed_with() -> None:
    failed = job("failed", problem={"code": "untrusted-model", "detail": "A byte differs."})
    with EvaluatorClient("http://x") as client, pytest.raises(UntrustedModel, match="A byte differs"):
        client.wait(failed)


def test_waiting_has_an_end() -> None:
    running = httpx.Response(200, json=job("running").model_dump(mode="json"))
    with EvaluatorClient("http://x", transport=answering(running)) as client, pytest.raises(Unavailable, match="still"):
        client.wait(job("queued"), timeout=0.05, interval=0.01)


def test_the_key_goes_with_each_call_and_shows_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEDLOOP_API_KEY", "mlk_0_secret\n")
    people = iter(["ann", "Jürgen Ott", None])
    seen: list[httpx.Headers] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(401, json=problem(Unauthenticated("No.")).model_dump(mode="json"))

    with (
        caplog.at_level(logging.DEBUG),
        InferenceClient("http://x", transport=httpx.MockTransport(answer), act_as=lambda: next(people)) as client,
    ):
        for _ in range(3):
            with pytest.raises(Unauthenticated) as refused:
                client.served_model()
            assert type(refused.value) is Unauthenticated
        shown = repr(vars(client)) + repr(ClientSettings()) + repr(refused.value) + repr(seen) + caplog.text
    assert [headers["authorization"] for headers in seen] == ["Bearer mlk_0_secret"] * 3
    assert [headers.get("x-medloop-act-as") for headers in seen] == ["ann", "J%C3%BCrgen Ott", None]
    assert "secret" not in shown


def test_a_key_that_cannot_be_one_is_refused_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDLOOP_API_KEY", "mlk_0 secret\nx")
    with pytest.raises(InvalidRequest, match="MEDLOOP_API_KEY") as refused:
        InferenceClient("http://x")
    assert "secret" not in str(refused.value)
