"""``erde cascade``: networks one behind another as one bundle; among them any ONNX classifier, as one stage.

No torch. The onnx package comes with the extra ``analysis`` and is imported only inside functions. May import:
calibration, runtime, recipe, bundle, policy, common.
"""
