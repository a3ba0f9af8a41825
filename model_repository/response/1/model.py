from serving.triton.models import ResponseModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
