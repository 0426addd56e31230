"""Engines: what a bundle's network runs on.

A version means its answers in float32 on ONNX Runtime. OpenVINO, and bfloat16, are for whoever asks for them by a
setting; they are named on every answer, and checked (`medloop.engines.checks`) before the first.
"""

from medloop.bundle import Bundle
from medloop.engines.network import REFERENCE_ENGINE, REFERENCE_PRECISION, Network
from medloop.engines.onnxruntime import OnnxRuntimeNetwork
from medloop.engines.openvino import OpenVinoNetwork, check_precision
from medloop.errors import InvalidRequest

__all__ = ["OFFERED", "REFERENCE_ENGINE", "REFERENCE_PRECISION", "Network", "check_offered", "open_network"]

OFFERED = (("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"))
"""Engines and the precisions they answer in."""


def open_network(
    bundle: Bundle,
    engine: str = REFERENCE_ENGINE,
    precision: str = REFERENCE_PRECISION,
    threads: int | None = None,
) -> Network:
    """The bundle's network, not yet held against its golden inputs (`check_golden`).

    `threads` bounds the threads of one run. None is one, which costs least CPU an image: answer several batches side
    by side to use more processors, or give `available_cpus()` where nothing else runs beside it.

    Raises:
        InvalidRequest: the engine or precision is not offered, not installed or not possible on this processor.
        UntrustedModel: the engine can make no network of the bundle's.
    """
    check_offered(engine, precision)
    if engine == "openvino":
        return OpenVinoNetwork(bundle, precision, threads or 1)
    return OnnxRuntimeNetwork(bundle, threads or 1)


def check_offered(engine: str, precision: str) -> None:
    """Raise InvalidRequest when `engine` cannot answer in `precision` on this machine."""
    if (engine, precision) not in OFFERED:
        offered = ", ".join(f"{precision} on {engine}" for engine, precision in OFFERED)
        raise InvalidRequest(f"There is no {precision} on {engine}; choose one of: {offered}.")
    if engine == "openvino":
        check_precision(precision)
