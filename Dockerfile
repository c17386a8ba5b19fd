# snpc in a container: docker build -t snpc . && docker run --rm snpc
# Without arguments it prunes the example that ships with snpc and prints a table of before and after. With a folder:
#   docker run --rm -v "$PWD:/models" snpc snpc prune model.onnx --target macs=0.5 --calib data.npz
FROM python:3.12-slim

COPY pyproject.toml README.md LICENSE /snpc/
COPY snpc /snpc/snpc
COPY examples /snpc/examples
RUN pip install --no-cache-dir /snpc

WORKDIR /models
CMD ["python", "/snpc/examples/prune_digits.py"]
