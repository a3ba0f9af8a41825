from serving.triton.models import AppendEventModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
