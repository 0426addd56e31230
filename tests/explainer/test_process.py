"""The explainer's process answers before the heavy libraries are there."""

import subprocess
import sys


def test_the_api_is_made_without_torch() -> None:
    script = (
        "import sys; import medloop_explainer.__main__;"
        "sys.exit(', '.join(sorted({'torch', 'captum', 'shap', 'numba', 'matplotlib'} & set(sys.modules))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
