from serving.triton.models import ShardedRetrievalModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
