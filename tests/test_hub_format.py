"""A saved folder is a Hub repository: fresh processes with empty caches load it, run it, and save it again whole."""

import json
import sys

import torch
from transformers import AutoModelForImageTextToText


CODE_FILES = {"configuration_delta_llava.py", "modeling_delta_llava.py", "processing_delta_llava.py"}


def test_all_auto_classes_load_the_folder_and_save_it_again_with_all_code(checkpoint, in_fresh_process, tmp_path):
    saved = "AutoModelForImageTextToText", "AutoModel", "AutoProcessor"
    load = """
import transformers

def load(auto, folder):
    loaded = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules."), loaded
    return loaded
"""
    output = in_fresh_process(f"""{load}
for auto in {saved}:
    load(auto, {str(checkpoint)!r}).save_pretrained(auto)
classes = "AutoConfig", "AutoModelForMultimodalLM", *{saved}
print(*(type(load(auto, {str(checkpoint)!r})).__name__ for auto in classes))
""")
    model = "DeltaLlavaForConditionalGeneration"
    expected = ["DeltaLlavaConfig", model, model, "DeltaLlavaModel", "DeltaLlavaProcessor"]
    assert output.split() == expected
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert len(auto_map) == 5
    for auto in saved:
        assert {path.name for path in (tmp_path / auto).glob("*.py")} == CODE_FILES
        for name in CODE_FILES:
            assert (tmp_path / auto / name).read_text() == (checkpoint / name).read_text()
        name = "processor_config.json" if auto == "AutoProcessor" else "config.json"
        found = json.loads((tmp_path / auto / name).read_text())["auto_map"]
        assert auto in found and (auto == "AutoProcessor" or found == auto_map)
    code = f"{load}\nfor auto in {saved}: load(auto, auto)"
    in_fresh_process(code, HF_HOME=str(tmp_path / "another_empty_cache"))


def test_pipeline_answers_chats_at_any_budget(checkpoint, in_fresh_process, noise, tmp_path):
    noise(1, size=(9, 6))[0].save(tmp_path / "image.png")
    output = in_fresh_process(f"""
import json
from transformers import pipeline

pipe = pipeline("image-text-to-text", model={str(checkpoint)!r}, trust_remote_code=True)
budgets = []
pipe.model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: budgets.append(args[2]))
content = [dict(type="image", url="image.png"), dict(type="text", text="What is it?")]
chat = [dict(role="user", content=content)]
options = dict(return_full_text=False, generate_kwargs=dict(max_new_tokens=4, do_sample=False, eos_token_id=None))
answers = [pipe(text=chat, **options)]
answers += [pipe(text=chat, processor_kwargs=dict(num_visual_tokens=budget), **options) for budget in (4, 144, "auto")]
answers.append(pipe(text=chat, processor_kwargs=dict(total_visual_tokens=20), **options))
print(json.dumps([budgets, [answer[0]["generated_text"] for answer in answers]]))
""")
    budgets, answers = json.loads(output)
    assert budgets == [36, 4, 144, 9, 16] and all(answers)


def test_saving_and_loading_keeps_every_logit(tiny_model, tiny_processor, checkpoint, noise):
    inputs = tiny_processor()(images=noise(1), text="<image> what", num_visual_tokens=16, return_tensors="pt")
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    assert torch.equal(loaded(**inputs).logits, tiny_model()(**inputs).logits)


def test_the_code_needs_nothing_but_torch_transformers_and_what_they_bring(checkpoint):
    from transformers.dynamic_module_utils import get_imports

    imported = {name for file in CODE_FILES for name in get_imports(checkpoint / file)}
    assert imported - set(sys.stdlib_module_names) == {"PIL", "huggingface_hub", "numpy", "torch", "transformers"}


def test_another_release_is_refused_below_the_range_and_warned_of_above(checkpoint, in_fresh_process):
    output = in_fresh_process(f"""
import json, logging, sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

refusals = []
transformers = sys.modules["transformers"]
transformers.__version__ = "5.18.0"
for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor):
    try:
        auto.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)
    except ImportError as error:
        refusals.append(str(error))
transformers.__version__ = "6.0.0"
handler, warnings = logging.Handler(), []
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger().addHandler(handler)
AutoModel.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)
print(json.dumps([refusals, [warning for warning in warnings if "6.0.0" in warning]]))
""")
    refusals, warnings = json.loads(output)
    sentence = "Delta-LLaVA needs transformers>=5.19,<6, but 5.18.0 is installed: run `pip install"
    assert refusals == [f'{sentence} "transformers>=5.19,<6"`.'] * 4
    assert set(warnings) == {"Delta-LLaVA is made for transformers>=5.19,<6 and untested with 6.0.0."}


def test_every_file_checks_the_release_before_it_imports_anything(checkpoint):
    for file in CODE_FILES:
        first = next(
            line for line in (checkpoint / file).read_text().splitlines() if line.startswith(("import ", "from "))
        )
        assert first.startswith(
            "import transformers" if file.startswith("configuration") else "from .configuration_delta_llava import "
        )
