"""What this package's entry point tells lmms-eval; apart from the model, whose import waits for lmms-eval's own."""

from lmms_eval.models.registry_v2 import ModelManifest


MODELS = (ModelManifest(model_id="delta_llava", chat_class_path="delta_llava.evaluation.lmms.DeltaLlava"),)
