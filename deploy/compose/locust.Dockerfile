# Locust with Triton's clients and a parquet reader. Code is mounted, not copied.
FROM python:3.11.10-slim
RUN pip install --no-cache-dir locust==2.47.0 "tritonclient[grpc,http]==2.73.0" pandas==1.5.3 pyarrow==17.0.0 numpy==1.26.4
RUN useradd --create-home locust
USER locust
WORKDIR /opt/vivace
ENV PYTHONPATH=/opt/vivace
ENTRYPOINT ["locust"]
