from serving.triton_fused import RecommendModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
