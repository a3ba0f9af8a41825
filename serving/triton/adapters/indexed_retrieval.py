from serving.triton.models import IndexedRetrievalModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
