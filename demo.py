"""See snpc at work: python3 demo.py

Sets up an environment in .venv, prunes the Vision Transformer that ships with snpc, and prints one table of parameters,
MACs, bytes, accuracy and latency before and after. Takes the options of examples/prune_digits.py.
"""

import subprocess
import sys

if sys.version_info < (3, 10):  # noqa: UP036  whoever runs this may have an older one
    sys.exit(f"demo.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}; for example: python3.12 demo.py")

from scripts import environment

STEPS = [("installing snpc with onnx, onnxruntime and numpy", ["--editable", "."])]

if __name__ == "__main__":
    python = environment.prepare("demo", STEPS)
    sys.exit(subprocess.call([str(python), str(environment.ROOT / "examples" / "prune_digits.py"), *sys.argv[1:]]))
