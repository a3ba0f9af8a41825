# NVIDIA's container with what the Python stages import, and the code of this checkout. For the profile gpu.
FROM nvcr.io/nvidia/tritonserver:26.05-py3
RUN pip install --no-cache-dir --break-system-packages \
    PyStemmer==3.1.0 bm25s==0.3.16 faiss-cpu==1.15.1 lmdb==3.0.0 msgpack==1.2.4 numpy==1.26.4 onnxruntime==1.32.0 \
    psutil==7.2.2 pyarrow==17.0.0 scipy==1.17.1 symspellpy==6.10.1 tokenizers==0.23.3 valkey==6.2.0 \
 && python3 -c "import site, pathlib; pathlib.Path(site.getsitepackages()[0], 'vivace.pth').write_text('/opt/vivace\n')"
COPY . /opt/vivace
CMD ["/opt/vivace/deploy/compose/gpu.sh"]
