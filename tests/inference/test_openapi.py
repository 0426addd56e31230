"""The OpenAPI document is true: what it forbids is refused, answers are as it says, and nothing ends in a 500."""

from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from medloop.bundle import Bundle
from medloop.testing import live_server
from medloop_inference.service import Service
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

Evaluator = Any  # the small one of conftest.py
LEFT_OUT = [
    ignored_auth,  # on loopback nobody is asked for credentials
    positive_data_acceptance,  # no schema can say which bytes are an image
    not_a_server_error,  # replaced by `answers_for_what_it_got`
]
EXAMPLES = 12


def answers_for_what_it_got(_: Any, response: Any, case: Any) -> None:
    """No server error, but for the time limit that a client set itself."""
    assert response.status_code < 500 or (response.status_code == 504 and "X-Request-Timeout-Ms" in case.headers)


def test_schemathesis_finds_nothing(
    app: FastAPI, service: Service, evaluator: Evaluator, first: Bundle, subtests: pytest.Subtests
) -> None:
    evaluator.champion(first)
    with live_server(app) as url:
        service.watcher.poll_once()
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        results = list(schema.get_all_operations())
        operations = [result.ok() for result in results if isinstance(result, Ok)]
        assert len(operations) == len(results)
        assert {"POST /v1/predict", "POST /invocations", "GET /v2"} <= {operation.label for operation in operations}
        for operation in operations:
            with subtests.test(operation=operation.label):

                @given(case=operation.as_strategy())
                @settings(
                    max_examples=EXAMPLES,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                def ask(case: Any) -> None:
                    case.call_and_validate(excluded_checks=LEFT_OUT, additional_checks=[answers_for_what_it_got])

                ask()
