"""Pods, nodes and cost of 10, 1,000 and 100,000 predictions a second, and what bursts do to them.

    python -m benchmarks.scaling [--only plan,stories] [--rates 10,1000,100000] [--seed 0] [--json FILE]

Processor time is read from benchmarks/README.md, the autoscaler's settings and the pod's size from k8s/base/inference,
sizes are measured with the code that makes records. docs/scaling.md says what the figures mean.
"""

from collections.abc import Sequence

from medloop_inference.settings import QueueSettings

from benchmarks.report import arguments, save
from benchmarks.scaling import tables
from benchmarks.scaling.assumptions import Times
from benchmarks.scaling.manifest import autoscaler, pod_size, scrape_s, window_s
from benchmarks.scaling.measured import Network, networks, ready_s
from benchmarks.scaling.plan import RATES, Plan, Site, plan, storing
from benchmarks.scaling.sizes import measure
from benchmarks.scaling.stories import STORIES, Told, fleet, tell

PARTS = ("plan", "stories")

Figures = dict[str, float | str]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", metavar="PART,…", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rates", metavar="N,…", default=",".join(f"{rate:.0f}" for rate in RATES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"{', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}.")
    rates = [float(rate) for rate in options.rates.split(",")]
    site = Site(pod_size(), autoscaler())
    served = list(networks().values())
    times = Times(custom_metrics=scrape_s(), custom_window=window_s())
    tables.show_settings(site, times)
    figures: Figures = {}
    if "plan" in parts:
        figures |= _plans(served, rates, site)
    if "stories" in parts:
        figures |= _stories(served, rates, site, times, options.seed)
    save(figures, options.json)
    return 0


def _plans(served: Sequence[Network], rates: Sequence[float], site: Site) -> Figures:
    sizes = {network.name: measure(network) for network in served}
    plans = [plan(network, rate, sizes[network.name], site) for network in served for rate in rates]
    stored = {(each.network, each.rate): storing(each.rate, each.pods, site.bounds) for each in plans}
    tables.show_predictions(served, sizes)
    tables.show_plans(plans)
    tables.show_needs(plans, stored)
    return {f"{_name(each)}.{figure}": value for each in plans for figure, value in _figures(each).items()}


def _figures(each: Plan) -> dict[str, float | str]:
    return {
        "pods": each.pods,
        "nodes": each.nodes,
        "dollars_a_month": each.total,
        "dollars_a_month.puts": each.puts,
        "first_bottleneck": each.first.what,
        "first_bottleneck.share": each.first.share,
    }


def _name(each: Plan) -> str:
    return f"plan.{each.network}.{each.rate:.0f}"


def _stories(served: Sequence[Network], rates: Sequence[float], site: Site, times: Times, seed: int) -> Figures:
    target_ms = float(QueueSettings.model_fields["target_ms"].default)
    told: dict[tuple[str, float, str], Told] = {}
    for network in served:
        for rate in rates:
            for story in STORIES:
                pods = fleet(network, rate, story, site, target_ms=target_ms, ready_s=ready_s())
                told[network.name, rate, story.name] = tell(story, rate, pods, times, seed)
    tables.show_stories(told)
    return {
        f"story.{network}.{rate:.0f}.{story}.{figure}": value
        for (network, rate, story), each in told.items()
        for figure, value in (
            ("in_target", each.in_target),
            ("refused", each.refused),
            ("recovered_s", each.recovered_s),
            ("peak_pods", each.peak_pods),
            ("stands_for", each.stands_for),
            ("requests", each.simulated),
        )
    }
