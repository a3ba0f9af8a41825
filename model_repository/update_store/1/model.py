from serving.triton.updates import UpdateStoreModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
