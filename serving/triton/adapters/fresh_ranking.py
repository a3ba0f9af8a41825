from serving.triton.fresh_ranking import FreshRankingModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
