from serving.triton.fused import RecommendModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
