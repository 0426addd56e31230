"""OpenVINO, an optional extra: float32, and bfloat16 where the processor computes in it.

Half the CPU an image in bfloat16 (ResNet-18 at 224 px: 16 ms against 32) for answers that are close, not equal; see
`medloop.engines.checks` for how close they must be.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import LifoQueue
from typing import Any

import numpy as np

from medloop.bundle import MODEL, Bundle, Outputs, Pixels
from medloop.cpus import available_cpus
from medloop.engines.network import Network
from medloop.errors import InvalidRequest, UntrustedModel

_HINTS = {"float32": "f32", "bfloat16": "bf16"}
_OUTPUTS = ("probabilities", "embedding", "cam")


class OpenVinoNetwork(Network):
    """As many runs go on side by side as processors allow, of `threads` each; further ones wait their turn."""

    engine = "openvino"

    def __init__(self, bundle: Bundle, precision: str = "float32", threads: int = 1) -> None:
        check_precision(precision)
        super().__init__(bundle, precision, threads)
        streams = max(1, available_cpus() // threads)
        settings = {
            # Named for float32 too: where a processor has bfloat16, that would be the default.
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams * threads,
            # Other threads of this process, and its neighbours, need the cores as well.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            compiled = _core().compile_model(bundle.folder / MODEL, "CPU", settings)
        except RuntimeError as exc:
            raise UntrustedModel(f"{MODEL} is no network that OpenVINO can run: {exc}") from exc
        # A precision that the processor lacks is replaced without a word: no answer may name one that did not give it.
        if (used := compiled.get_property("INFERENCE_PRECISION_HINT").to_string()) != _HINTS[precision]:
            raise InvalidRequest(f"OpenVINO would compute in {used} here, not in {precision}; choose float32.")
        names = {name for output in compiled.outputs for name in output.get_names()}
        self._outputs = [name for name in _OUTPUTS if name in names]
        # The one that answered last is taken first: its memory is the warmest.
        self._idle: LifoQueue[Any] = LifoQueue()  # of InferRequest
        for _ in range(streams):
            self._idle.put(compiled.create_infer_request())

    def run(self, images: Pixels) -> Outputs:
        request = self._idle.get()
        try:
            request.infer({"image": np.ascontiguousarray(images)}, share_inputs=True)
            # Copies: the request's own memory is overwritten by whoever takes it next.
            values = {name: request.get_tensor(name).data.copy() for name in self._outputs}
        finally:
            self._idle.put(request)
        return Outputs(values["probabilities"], values["embedding"], values.get("cam"))


def check_precision(precision: str) -> None:
    """Raise InvalidRequest when OpenVINO is not installed, or this processor cannot compute in `precision`."""
    import_openvino()
    capabilities = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bfloat16" and "BF16" not in capabilities:
        raise InvalidRequest("This processor does not compute in bfloat16; choose the precision float32.")


@cache
def _core() -> Any:
    """OpenVINO's plug-ins: one set for the whole process, loaded in a thread that ends.

    The plug-in for CPUs gives the thread that loads it another stack for signals, and unmaps that when it goes itself,
    in whatever thread that is. If the main thread had loaded it, the next signal that Python handles would end the
    process with a segmentation fault.
    """
    with ThreadPoolExecutor(1) as once:
        return once.submit(_load).result()


def _load() -> Any:
    core = import_openvino().Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plug-in
    return core


def import_openvino() -> Any:
    """The package, imported when it is first needed: it takes a fifth of a second and 35 MiB."""
    # Its converter, which it imports by itself, would report each import to its makers. Where their telemetry cannot
    # be imported it does without, and nobody outside learns what runs here.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as exc:
        raise InvalidRequest("OpenVINO is not installed: install medloop with its extra openvino.") from exc
    return openvino
