# The server without a GPU (target serve) and the load generator (target load): slim Python, pip's Triton, Envoy, and
# the code of this checkout, which comes last: a change of it makes small layers. Versions are those of
# requirements.txt. Wheels in .tools/wheels, where there are any, are taken in the index's place.
ARG BASE=python:3.11.10-slim

FROM ${BASE} AS packages
WORKDIR /build
COPY deploy/compose/packages.py pyproject.toml requirements.txt .tools/wheel[s] ./
ARG MORE=""
RUN python3 -m venv /opt/venv \
 && python3 packages.py search valkey ui ${MORE} > packages.txt \
 && if ls ./*.whl >/dev/null 2>&1; then export PIP_NO_INDEX=1 PIP_FIND_LINKS=/build; fi \
 && /opt/venv/bin/pip install --no-cache-dir --constraint requirements.txt --requirement packages.txt \
 && cd /opt/venv/lib/python3.11/site-packages \
 && rm -rf pandas/tests pyarrow/tests scipy/*/tests numpy/*/tests

FROM scratch AS code
COPY LICENSE README.md pyproject.toml requirements.txt /
COPY deploy /deploy
COPY loadtest /loadtest
COPY preprocessing /preprocessing
COPY search /search
COPY serving /serving
COPY training /training
COPY vivace /vivace

FROM ${BASE} AS runtime
# runc before 1.2 gives a tmpfs the mode of the folder under it from the second start on
RUN mkdir -m 1777 /var/log/vivace
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=packages /opt/venv /opt/venv

FROM runtime AS serve
COPY --from=code / /opt/vivace
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation --editable /opt/vivace
ENTRYPOINT ["python3", "/opt/vivace/deploy/compose/entry.py"]

FROM runtime AS runtime-load
COPY requirements.txt .tools/wheel[s] /build/
RUN if ls /build/*.whl >/dev/null 2>&1; then export PIP_NO_INDEX=1 PIP_FIND_LINKS=/build; fi \
 && pip install --no-cache-dir --constraint /build/requirements.txt locust

FROM runtime-load AS load
COPY --from=code / /opt/vivace
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation --editable /opt/vivace
USER nobody
WORKDIR /tmp
ENTRYPOINT ["locust", "-f", "/opt/vivace/loadtest/generate/locustfile.py"]
