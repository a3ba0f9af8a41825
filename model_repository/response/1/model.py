from serving.triton_models import ResponseModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
