from serving.triton_models import QuerySearchModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
