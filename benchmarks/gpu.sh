#!/usr/bin/env bash
# What an NVIDIA GPU saves, measured on this machine in under eight minutes: see benchmarks/gpu.py.
#
#   benchmarks/gpu.sh [FOLDER]        a table and results.json go to FOLDER (default: gpu-results)
#
# What is missing is installed into FOLDER/venv first, which takes as long as the download of torch takes. An interpreter
# that has torch with CUDA and onnxruntime-gpu already (PYTHON=...) is used as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu-results}
python=${PYTHON:-python3}

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L | grep -q GPU; then
  echo "benchmarks/gpu.sh: no NVIDIA GPU is at hand (nvidia-smi finds none);" \
    "'python benchmarks/gpu.py --cpu' tries the script without one" >&2
  exit 2
fi
nvidia-smi -L

has_all='
import onnxruntime, snpc.cli, snpc.torch, torch
assert torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers()'
if ! "$python" -c "$has_all" 2>/dev/null; then
  mkdir -p "$folder"
  "$python" -m venv --system-site-packages "$folder/venv"
  python="$folder/venv/bin/python"
  # snpc brings the CPU build of onnxruntime; both builds are one package to Python, so the GPU's has to come last.
  "$python" -m pip install --quiet "torch>=2.4" ".[torch]"
  "$python" -m pip uninstall --quiet --yes onnxruntime
  "$python" -m pip install --quiet --force-reinstall --no-deps onnxruntime-gpu
  "$python" -m pip install --quiet "onnxruntime-gpu[cuda,cudnn]"
fi

exec "$python" benchmarks/gpu.py --out "$folder"
