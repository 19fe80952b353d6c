"""Networks from elsewhere as parts of a chain: any ONNX classifier, with its preprocessing, as one stage of a bundle.

No torch. The onnx package comes with the extra ``analysis`` and is imported only inside functions. May import:
calibration, runtime, recipe, bundle, policy, common.
"""
