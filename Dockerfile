# pspinal-jax on CPU. In the checkout:
#   docker build -t pspinal-jax .
#   docker run --rm -v "$PWD/runs:/home/user/runs" -v "$PWD/pictures:/pictures:ro" pspinal-jax train folder --data.path /pictures
# The first stage builds the wheel, the second installs it, both with the versions of constraints.txt. Checked by hadolint and by
# tests/packaging/test_docker.py; never built by us, who have no Docker.
FROM python:3.13-slim AS wheel
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE CHANGELOG.md CONTRIBUTING.md ./
COPY pspinal_jax pspinal_jax
COPY configs configs
COPY results/gradients.py results/gradients.py
RUN pip install --no-cache-dir -c constraints.txt hatchling && \
    pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist .

FROM python:3.13-slim
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    wheel=$(echo /dist/*.whl) && pip install --no-cache-dir -c /tmp/constraints.txt "${wheel}[efficientnet,hub,tensorboard]"
RUN useradd --create-home --uid 1000 user
USER 1000
WORKDIR /home/user
ENTRYPOINT ["pspinal-jax"]
CMD ["--help"]
