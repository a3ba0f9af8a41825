from serving.triton.models import FeatureTransformModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
