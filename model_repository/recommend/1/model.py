from serving.triton_models import RecommendModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
