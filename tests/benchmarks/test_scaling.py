"""The scaling simulation against what theory, Kubernetes' documentation and the service's own bounds say."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling import command, tables
from benchmarks.scaling.assumptions import NODES, Times
from benchmarks.scaling.autoscaler import DOWN, UP, Autoscaler, Metric, Policy, Reading, Rules, Settings, proposed
from benchmarks.scaling.cluster import Cluster, Fleet
from benchmarks.scaling.manifest import PodSize, autoscaler, pod_size, quantity, scrape_s, window_s
from benchmarks.scaling.measured import cpu_ms, networks, ready_s
from benchmarks.scaling.plan import Site, plan
from benchmarks.scaling.pod import Pod, Work
from benchmarks.scaling.sizes import measure
from benchmarks.scaling.stories import STORIES, tell
from benchmarks.scaling.stories import fleet as story_fleet

CPU = Metric("cpu", 0.5)
IMMEDIATE = Rules(0.0, (Policy("Percent", 900, 15.0),))


def settings(up: Rules = IMMEDIATE, down: Rules = DOWN, maximum: int = 100) -> Settings:
    return Settings(1, maximum, (CPU,), up, down)


def readings(*values: float | None, ignored: int = 0) -> list[Reading]:
    return [*(Reading(value) for value in values), *[Reading(ignored=True)] * ignored]


def follow(given: Settings, values: Sequence[float], pods: int, every: float = 15.0) -> list[int]:
    """How many pods there are after each sync, all of them with the same value, which is used CPU per request."""
    subject, seen = Autoscaler(given), []
    for number, value in enumerate(values):
        pods = subject.sync(number * every, pods, [(CPU, readings(*[value] * pods))])
        seen.append(pods)
    return seen


class TestAutoscaler:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [(1.0, 8), (0.25, 2), (0.55, 4), (0.45, 4), (0.56, 5), (0.44, 4), (0.37, 3), (0.6, 5)],
    )
    def test_it_asks_for_the_documented_number(self, value: float, expected: int) -> None:
        """ceil(pods × value / target), and nothing within a tenth of the target."""
        assert proposed(CPU, readings(*[value] * 4), 4, settings()) == expected

    def test_who_is_not_ready_counts_as_idle_when_there_would_be_more(self) -> None:
        assert proposed(CPU, readings(1.0, 1.0), 4, settings()) == 4
        assert proposed(CPU, readings(1.0, 1.0, ignored=1), 3, settings()) == 4  # (1 + 1 + 0) / 3 / .5 × 3
        assert proposed(CPU, readings(1.0, 1.0, ignored=2), 4, settings()) == 4  # exactly at the target

    def test_who_is_not_ready_does_not_count_when_there_would_be_fewer(self) -> None:
        assert proposed(CPU, readings(0.2, 0.2, ignored=1), 3, settings()) == 1

    def test_a_missing_figure_never_turns_the_direction_round(self) -> None:
        assert proposed(CPU, readings(0.6, None, None, None), 4, settings()) == 4
        assert proposed(CPU, readings(0.4, None, None, None), 4, settings()) == 4
        assert proposed(CPU, readings(0.1, 0.1, 0.1, None), 4, settings()) == 3  # (.3 + 1) / 4 / .5 × 4

    def test_without_any_figure_nothing_changes(self) -> None:
        assert proposed(CPU, readings(None, ignored=1), 2, settings()) is None
        assert Autoscaler(settings()).sync(0.0, 2, [(CPU, readings(None, None))]) == 2

    def test_the_larger_of_two_metrics_counts_and_a_missing_one_forbids_fewer(self) -> None:
        wait = Metric("queue-wait", 0.2)
        both = Settings(1, 100, (CPU, wait), IMMEDIATE, Rules(0.0, DOWN.policies))
        low, high = readings(*[0.1] * 4), readings(*[0.4] * 4)
        assert Autoscaler(both).sync(0.0, 4, [(CPU, low), (wait, high)]) == 8
        assert Autoscaler(both).sync(0.0, 4, [(CPU, low), (wait, readings(*[None] * 4))]) == 4
        assert Autoscaler(both).sync(0.0, 4, [(CPU, readings(*[1.0] * 4)), (wait, readings(*[None] * 4))]) == 8

    def test_the_default_doubles_or_adds_four(self) -> None:
        assert follow(settings(UP), [5.0] * 4, 1) == [5, 10, 20, 40]

    def test_a_policy_counts_what_changed_in_its_own_period(self) -> None:
        slow = Rules(0.0, (Policy("Pods", 2, 60.0),))
        assert follow(settings(slow), [5.0] * 6, 4) == [6, 6, 6, 6, 8, 8]
        least = Rules(0.0, (Policy("Pods", 2, 15.0), Policy("Percent", 100, 15.0)), "Min")
        assert follow(settings(least), [5.0] * 2, 4) == [6, 8]
        assert follow(settings(Rules(0.0, UP.policies, "Disabled")), [5.0], 4) == [4]

    def test_fewer_pods_wait_for_the_window_and_then_go_one_a_minute(self) -> None:
        careful = Rules(300.0, (Policy("Pods", 1, 60.0),))
        seen = follow(settings(down=careful), [0.5, *[0.1] * 40], 10)
        assert seen[:20] == [10] * 20  # the first, at second 0, still asked for ten until second 300
        assert seen[20] == 9
        assert seen[24] == 8

    def test_nothing_shrinks_before_the_first_window_is_over(self) -> None:
        assert follow(settings(), [0.1] * 21, 10) == [10] * 20 + [2]

    def test_a_window_for_more_pods_takes_the_least_of_it(self) -> None:
        assert follow(settings(Rules(30.0, IMMEDIATE.policies)), [0.5, 2.0, 1.0, 2.0, 2.0], 2) == [2, 2, 4, 4, 16]

    def test_it_stays_between_its_bounds(self) -> None:
        assert follow(settings(maximum=6), [5.0] * 3, 2) == [6, 6, 6]
        assert Autoscaler(settings()).sync(0.0, 0, [(CPU, [])]) == 1


def waits(work: Work, target_s: float, arrivals: Sequence[float], service_s: float) -> tuple[float, int]:
    """The mean wait in the queue, and how many were refused."""
    told: list[float | None] = []
    pod = Pod(work, target_s * 1000, lambda at, seconds: told.append(seconds))
    pod.serve(arrivals, arrivals[-1])
    pod.finish()
    assert len(told) == len(arrivals)
    answered = [seconds for seconds in told if seconds is not None]
    return float(np.mean(answered)) - service_s, len(told) - len(answered)


class TestPod:
    @pytest.mark.parametrize("load", [0.3, 0.7])
    def test_one_run_and_batches_of_one_wait_as_in_m_d_1(self, load: float) -> None:
        """Pollaczek and Khinchine: ρ S / (2 (1 − ρ)). The target is such that one image is a batch's limit."""
        service = 0.06
        arrivals = np.cumsum(np.random.default_rng(1).exponential(service / load, 25_000)).tolist()
        mean, refused = waits(Work(lambda images: images * service), 1.0, arrivals, service)
        assert mean == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)
        assert refused < 0.001 * len(arrivals)

    def test_four_runs_wait_as_in_m_m_4(self) -> None:
        """Erlang's C: the chance to wait at all, times S / (c − a)."""
        service, servers, offered = 0.09, 4, 2.4  # of four, in Erlang
        random = np.random.default_rng(2)
        arrivals = np.cumsum(random.exponential(service / offered, 30_000)).tolist()
        mean, refused = waits(Work(lambda images: random.exponential(service), servers), 1.0, arrivals, service)
        terms = [offered**k / math.factorial(k) for k in range(servers)]
        last = offered**servers / math.factorial(servers) * servers / (servers - offered)
        chance = last / (sum(terms) + last)
        assert mean == pytest.approx(chance * service / (servers - offered), rel=0.1)
        assert refused < 0.001 * len(arrivals)

    def test_overload_answers_at_capacity_and_in_time(self) -> None:
        """As the serving benchmark measured of the service: ten times what it can do, and who is let in is in time."""
        heavy = networks()["resnet18_224"]
        told: list[float | None] = []
        pod = Pod(Work(heavy.batch_s, 2), 1000.0, lambda at, seconds: told.append(seconds))
        pod.serve(np.cumsum(np.random.default_rng(3).exponential(1 / 540, 540 * 30)).tolist(), 30.0)
        pod.finish()
        answered = [seconds for seconds in told if seconds is not None]
        capacity = 2 / (heavy.batch_s(2) / 2)  # two runs; a tenth of the target has room for two images
        assert len(answered) == pytest.approx(30 * capacity, rel=0.06)
        assert float(np.quantile(answered, 0.99)) < 1.0

    def test_busy_time_is_what_was_worked(self) -> None:
        pod = Pod(Work(lambda images: images * 0.1), 1000.0, lambda at, seconds: None)
        pod.serve([0.0], 0.05)
        assert pod.busy_s(0.05) == pytest.approx(0.05)
        pod.serve([], 1.0)
        assert pod.busy_s(1.0) == pytest.approx(0.1)


def fleet(pods: int = 2, pods_a_node: int = 10, stands_for: int = 1, maximum: int = 10) -> Fleet:
    return Fleet(
        work=Work(lambda images: images * 0.03),
        speed=1.0,
        request=1.0,
        pods=pods,
        nodes=math.ceil(pods / pods_a_node),
        pods_a_node=pods_a_node,
        node_price=1.0,
        settings=Settings(2, maximum, (Metric("cpu", 0.7), Metric("queue-wait", 0.2)), UP, DOWN),
        target_ms=1000.0,
        ready_s=2.4,
        stands_for=stands_for,
    )


class TestCluster:
    def test_a_steady_load_is_answered_by_the_pods_that_are_there(self) -> None:
        cluster = Cluster(fleet(), lambda at: 40.0, Times(), seed=0)
        cluster.run(120.0)
        came = sum(bucket.came for bucket in cluster.buckets.values())
        assert came == pytest.approx(40 * 120, abs=4 * math.sqrt(40 * 120))  # four standard deviations of Poisson
        assert sum(bucket.in_target for bucket in cluster.buckets.values()) == came
        assert [pods for _, pods in cluster.history] == [2]

    def test_a_burst_is_refused_until_the_new_pods_serve(self) -> None:
        times = Times()
        cluster = Cluster(fleet(), lambda at: 200.0 if at >= 30 else 20.0, times, seed=0)
        cluster.run(180.0)
        assert not any(bucket.refused for number, bucket in cluster.buckets.items() if number < 3)
        assert cluster.buckets[3].refused > 0
        assert cluster.buckets[17].good == 1.0
        assert max(pods for _, pods in cluster.history) <= 10
        started = next(at for at, pods in cluster.history if pods > 2)
        first = started + times.schedule + times.bundle + 2.4 + times.register
        assert all(
            bucket.in_target <= (10 + 1) * 2 / 0.03  # what two pods do in a bucket, and what waits at its end
            for number, bucket in cluster.buckets.items()
            if (number + 1) * 10 <= first
        )

    def test_without_room_pods_wait_for_a_node(self) -> None:
        def recovered(pods_a_node: int) -> int:
            cluster = Cluster(fleet(pods_a_node=pods_a_node), lambda at: 200.0, Times(), seed=0)
            cluster.run(240.0)
            return max(number for number, bucket in cluster.buckets.items() if bucket.good < 0.99)

        times = Times()
        assert 10 * (recovered(2) - recovered(10)) == pytest.approx(times.node + times.pull, abs=20)

    def test_one_seed_tells_one_story(self) -> None:
        def story(seed: int) -> tuple[object, object]:
            cluster = Cluster(fleet(), lambda at: 90.0, Times(), seed)
            cluster.run(60.0)
            return cluster.buckets, cluster.history

        assert story(1) == story(1)
        assert story(1) != story(2)

    def test_a_sample_of_a_fleet_does_as_the_fleet(self) -> None:
        def shares(stands_for: int) -> tuple[float, int]:
            whole = fleet(pods=24, pods_a_node=12, stands_for=stands_for, maximum=96)
            cluster = Cluster(whole, lambda at: 2000.0 if at >= 20 else 500.0, Times(), seed=3)
            cluster.run(60.0)
            buckets = cluster.buckets.values()
            refused, came = sum(bucket.refused for bucket in buckets), sum(bucket.came for bucket in buckets)
            return refused / came, max(pods for _, pods in cluster.history)

        (whole, most), (sampled, sampled_most) = shares(1), shares(6)
        assert sampled == pytest.approx(whole, abs=0.03)
        assert sampled_most == pytest.approx(most, rel=0.2)


class TestInputs:
    def test_the_manifests_of_the_tree_can_be_simulated(self) -> None:
        given, size = autoscaler(), pod_size()
        assert 2 <= given.minimum <= given.maximum
        assert {metric.kind for metric in given.metrics} == {"queue-wait", "cpu"}
        assert 0 < size.cpu <= size.cpu_limit
        assert 0 < scrape_s() <= window_s() <= 60

    def test_every_setting_of_the_manifest_counts(self, tmp_path: Path) -> None:
        (tmp_path / "scaling.yaml").write_text("""
kind: HorizontalPodAutoscaler
spec:
  minReplicas: 3
  maxReplicas: 9
  metrics:
    - {type: Pods, pods: {metric: {name: medloop_queue_wait_seconds}, target: {averageValue: 50m}}}
    - {type: Resource, resource: {name: cpu, target: {averageUtilization: 60}}}
  behavior:
    scaleUp: {selectPolicy: Min, tolerance: 50m, policies: [{type: Pods, value: 2, periodSeconds: 30}]}
    scaleDown: {stabilizationWindowSeconds: 60}
---
kind: Deployment
spec:
  template:
    spec:
      containers:
        - {resources: {requests: {cpu: 500m, memory: 1Gi}, limits: {cpu: "2"}}}
        - {resources: {requests: {cpu: 100m, memory: 64Mi}, limits: {cpu: 100m}}}
""")
        assert autoscaler(tmp_path) == Settings(
            3,
            9,
            (Metric("queue-wait", 0.05), Metric("cpu", 0.6)),
            Rules(0.0, (Policy("Pods", 2, 30),), "Min", 0.05),
            Rules(60, DOWN.policies),
        )
        assert pod_size(tmp_path) == PodSize(0.6, 2**30 + 64 * 2**20, 2.1)

    def test_a_metric_that_is_not_simulated_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="0 manifests of kind HorizontalPodAutoscaler"):
            autoscaler(tmp_path)
        (tmp_path / "scaling.yaml").write_text(
            "{kind: HorizontalPodAutoscaler, spec: {maxReplicas: 2, metrics: [{type: External}]}}"
        )
        with pytest.raises(ValueError, match="does not know"):
            autoscaler(tmp_path)

    @pytest.mark.parametrize(("text", "value"), [("250m", 0.25), ("2", 2), (1, 1), ("1Gi", 2**30), ("5k", 5000)])
    def test_quantities(self, text: str | int, value: float) -> None:
        assert quantity(text) == value

    def test_figures_come_from_the_benchmarks_tables(self) -> None:
        text = "| tiny64, 16 clients | CPU |\n|---|---|\n| other | 1 |\n| medloop | 1,234.5 |\n"
        assert cpu_ms(text, "tiny64", 16) == 1234.5
        with pytest.raises(ValueError, match="no table for tiny64 with 1 clients"):
            cpu_ms(text, "tiny64", 1)
        assert 0 < ready_s() < 60
        for network in networks().values():
            assert network.batch_s(1) == pytest.approx(network.alone)
            assert network.batch_s(8) / 8 == pytest.approx(network.together)
            assert network.batch_s(32) / 32 >= network.together * (1 - 1e-9)

    def test_a_record_has_its_embedding_as_float16(self) -> None:
        light, heavy = (measure(network) for network in networks().values())
        assert heavy.embedding == 4 * math.ceil(512 * 2 / 3)
        assert heavy.document - light.document == pytest.approx(heavy.embedding - light.embedding, abs=30)
        assert heavy.spooled > heavy.answer + heavy.embedding


class TestPlan:
    def test_pods_nodes_and_dollars(self) -> None:
        site = Site(PodSize(1.0, 2**30, 1.0), settings(maximum=10))
        heavy = networks()["resnet18_224"]
        found = plan(heavy, 1_000.0, measure(heavy), site)
        assert found.pods == math.ceil(1_000 * heavy.together / CPU.target)
        small, large = NODES
        assert found.node is large
        assert found.nodes == math.ceil(found.pods / 15)  # 15.2 processors for pods of one
        assert found.compute == pytest.approx(found.nodes * large.price * 730)
        assert found.compute < found.pods * small.price * 730
        assert found.first.what == "pods of the autoscaler"
        assert found.puts == pytest.approx(1_000 * 730 * 3600 * 0.005 / 1000)

    def test_a_light_network_does_not_gain_from_more_than_one_processor(self) -> None:
        light = networks()["tiny64"]
        small, large = (
            plan(light, 100_000.0, measure(light), Site(size, settings())).pods
            for size in (PodSize(2.0, 2**30, 2.0), PodSize(8.0, 2**30, 8.0))
        )
        assert small == large == math.ceil(100_000 * light.together)


def said(text: str) -> set[tuple[str, ...]]:
    """The rows and lines of a text, however wide their columns are."""
    return {tuple(cell.strip() for cell in line.split("|")) for line in text.splitlines() if line.strip("-| ")}


class TestPage:
    PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"

    def test_it_has_what_the_command_prints(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """After a change to a manifest or a measured figure: make bench-scaling, and put its tables there."""
        monkeypatch.setattr(sys, "argv", ["scaling", "--only", "plan"])
        assert command.main() == 0
        assert said(capsys.readouterr().out) <= said(self.PAGE.read_text())

    def test_it_has_what_the_simulation_prints(self, capsys: pytest.CaptureFixture[str]) -> None:
        """One story of the many, the seed being the command's."""
        site, heavy = Site(pod_size(), autoscaler()), networks()["resnet18_224"]
        story = next(story for story in STORIES if story.name == "burst ×10")
        pods = story_fleet(heavy, 10.0, story, site, target_ms=1000.0, ready_s=ready_s())
        told = tell(story, 10.0, pods, Times(custom_metrics=scrape_s(), custom_window=window_s()))
        tables.show_stories({(heavy.name, 10.0, story.name): told})
        assert said(capsys.readouterr().out) <= said(self.PAGE.read_text())
