from serving.triton_models import FeatureTransformModel as TritonPythonModel  # noqa: F401 - the name Triton looks for
