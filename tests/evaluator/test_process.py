"""The evaluator's process stays light."""

import subprocess
import sys
from collections.abc import Callable

from medloop.registry import Version

SCRIPT = """
import sys
from medloop_evaluator.__main__ import main
from medloop_evaluator.evaluate import Evaluator
from medloop_evaluator.settings import EvaluatorSettings
from medloop.registry import Registry
from medloop.storage.objects import open_objects

settings = EvaluatorSettings()
registry = Registry(settings.tracking.tracking_uri)
evaluator = Evaluator(registry, open_objects(settings.storage.objects_url), settings.home)
report = evaluator.evaluate(registry.version("tiny", "1"), "test", lambda *_: None)
assert report.images == 80
sys.exit(", ".join(sorted({"torch", "torchvision", "captum", "shap", "sklearn"} & set(sys.modules))) or None)
"""


def test_an_evaluation_imports_no_torch(register: Callable[..., Version]) -> None:
    register()
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
