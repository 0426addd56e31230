"""The alerts of `k8s/components/monitoring`, beside what the services tell."""

import re
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types
from medloop.auth import OPEN_PATHS
from medloop.http import Readiness, create_app
from medloop.settings import ServerSettings
from medloop.testing import asgi_client
from medloop_inference.oip import router
from prometheus_client.parser import text_string_to_metric_families

ALERTS = Path(__file__).resolve().parents[2] / "k8s" / "components" / "monitoring" / "alerts.yaml"
PROBES = ["/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/cells/ready"]


@pytest.mark.anyio
async def test_probes_wake_nobody_and_failed_requests_do() -> None:
    """Both sides of the alert, beside the metrics of a service without a model."""
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["spec"]["groups"] for rule in group["rules"]]
    expression = next(rule["expr"] for rule in rules if rule["alert"] == "MedLoopFailsRequests")
    failed, answered = re.findall(r"rate\(medloop_requests_total\{(.*?)\}\[5m\]\)", expression)
    app = create_app("test", ServerSettings(), routers=[router], readiness=Readiness())
    async with asgi_client(app) as client:
        assert (await client.get("/readyz")).status_code == 503
        for path in [*PROBES, "/v2/models/cells", "/v2"]:
            await client.get(path)
        families = text_string_to_metric_families((await client.get("/metrics")).text)
    told = [each.labels for family in families for each in family.samples if each.name == "medloop_requests_total"]
    assert {"/readyz", "/v2/health/ready", "/v2/models/{name}/ready"} < {labels["route"] for labels in told}
    assert {labels["route"] for labels in told if selected(answered, labels)} == {"/v2/models/{name}", "/v2"}
    assert not any(selected(failed, {"route": path, "status": "503"}) for path in OPEN_PATHS)
    for status, counts in (("500", True), ("503", True), ("429", False), ("200", False)):
        assert selected(failed, {"route": "/v1/predict", "status": status}) is counts
        assert selected(answered, {"route": "/v1/predict", "status": status})


def selected(matchers: str, labels: dict[str, str]) -> bool:
    """Whether Prometheus' label matchers, regular expressions for the whole of a value, take these labels."""
    found = re.findall(r'(\w+)(=~|!~)"([^"]*)"', matchers)
    assert ",".join(f'{name}{how}"{value}"' for name, how, value in found) == matchers
    return all((re.fullmatch(value, labels[name]) is not None) is (how == "=~") for name, how, value in found)
