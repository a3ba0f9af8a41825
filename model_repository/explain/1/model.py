from serving.triton.explain import ExplainModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
