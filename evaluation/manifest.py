"""The entry point of lmms-eval's plug-in: in its own file, because the model can only be imported after lmms-eval."""

from lmms_eval.models.registry_v2 import ModelManifest


MODELS = (ModelManifest(model_id="delta_llava", chat_class_path="delta_llava.evaluation.lmms.DeltaLlava"),)
