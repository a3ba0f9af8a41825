from serving.triton.models import QuerySearchModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
