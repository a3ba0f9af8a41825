# The official container with what the Python stages import. Code is mounted, not copied.
FROM nvcr.io/nvidia/tritonserver:26.05-py3
RUN pip install --no-cache-dir --break-system-packages lmdb==3.0.0 msgpack==1.2.4 onnxruntime==1.32.0 "numpy<3" \
 && python3 -c "import site, pathlib; pathlib.Path(site.getsitepackages()[0], 'vivace.pth').write_text('/opt/vivace\n')"
