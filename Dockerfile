# The image of deploy/kubernetes/: vggrow with the tried versions, and MLflow's server. About 9 GB, most of it CUDA's
# libraries; the same image serves on CPUs. GPUs need NVIDIA's driver 580 or later on the node and its container toolkit.
#
#     docker build --tag vggrow:0.1.0 .

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
# What vggrow needs, without vggrow: a layer that is made anew only when pyproject.toml or constraints.txt change.
RUN ["python", "-c", "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['server'], sep='\\n', file=open('needed.txt', 'w'))"]
COPY vggcore vggcore
COPY pipelines pipelines
COPY training training
COPY deploy deploy
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir dist .

FROM python:3.11-slim-bookworm
# wget: KubeRay's containers that wait for the head and submit to it call it. Every Python package is a wheel: no compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 vggrow \
    && useradd --uid 10001 --gid 10001 --create-home vggrow
# Into the image's own Python and so to /usr/local/bin, which is on PATH in login shells too: KubeRay starts Ray in one.
COPY constraints.txt /opt/vggrow/
COPY --from=wheel /src/needed.txt /opt/vggrow/
RUN python -m pip install --no-cache-dir --requirement /opt/vggrow/needed.txt --constraint /opt/vggrow/constraints.txt
COPY --from=wheel /src/dist/ /opt/vggrow/dist/
RUN python -m pip install --no-cache-dir --no-deps /opt/vggrow/dist/*.whl && vggrow --version

ENV PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    RAY_USAGE_STATS_ENABLED=0
# By number: runAsNonRoot cannot be checked against a name.
USER 10001:10001
WORKDIR /home/vggrow
# With the first signal a run writes its checkpoint and ends.
STOPSIGNAL SIGINT
ENTRYPOINT ["vggrow"]
CMD ["--help"]
