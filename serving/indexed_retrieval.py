from serving.triton_models import IndexedRetrievalModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
