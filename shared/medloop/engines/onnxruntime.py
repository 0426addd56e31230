"""ONNX Runtime in float32: what a version means.

The settings are those that cost least CPU an image for the same answers. Measured with ONNX Runtime 1.31 on two AMD
EPYC cores (Zen 4), CPU and wall milliseconds an image, ResNet-18 at 224 px, batch 1 | 4 | 16:

    one thread                               33.5 33.7 | 32.2 32.2 | 31.5 31.8
    two, sleeping, smaller blocks            35.7 19.5 | 34.5 17.6 | 34.6 18.6
    two, sleeping                            40.1 39.4 | 36.3 19.2 | 34.5 17.4
    two, spinning (ONNX Runtime's default)   58.2 53.4 | 35.0 17.8 | 43.9 40.4

and at 64 px, batch 1 | 16, a CNN of three layers and ResNet-18:

    one thread                               0.084 0.082 | 0.068 0.066       4.6 4.5 | 2.8 2.8
    two, sleeping, smaller blocks            0.147 0.114 | 0.082 0.050       5.0 2.8 | 3.0 1.6
    two, spinning                            0.138 0.075 | 0.075 0.038       4.7 2.4 | 2.9 1.5

A waiting thread spins at full cost, and waits much as soon as anything else wants its core. Two runs of one thread each
use two cores as well as one run of two does, and cost less; only a lone image is answered sooner by more threads.
"""

from medloop.bundle import MODEL, Bundle, Outputs, Pixels
from medloop.engines.network import Network
from medloop.errors import UntrustedModel


class OnnxRuntimeNetwork(Network):
    """Runs of several threads' calls go on side by side."""

    engine = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        import onnxruntime as ort  # here, so that reading a card stays light

        super().__init__(bundle, "float32", threads)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Work is handed out in smaller and smaller blocks, so that a thread that lost its core holds up less of it.
        options.add_session_config_entry("session.dynamic_block_base", "4")
        # One block of memory for each batch size that ever came would stay: 365 MiB against 287 for ResNet-18 at
        # 224 px and up to 16 images, at the same speed. What the arena itself holds is what the largest batch took.
        options.enable_mem_pattern = False
        try:
            # From the path: the bytes would be held a second time.
            self._session = ort.InferenceSession(bundle.folder / MODEL, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime's own errors share no narrower base
            raise UntrustedModel(f"{MODEL} is no network that ONNX Runtime can run: {exc}") from exc
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, images: Pixels) -> Outputs:
        values = dict(zip(self._outputs, self._session.run(None, {"image": images}), strict=True))
        return Outputs(values["probabilities"], values["embedding"], values.get("cam"))
