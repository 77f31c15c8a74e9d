"""
Metrics of the paper's benchmarks as modules of `evaluate` that load offline by the path of their folder.

```python
from pathlib import Path

import evaluate

from delta_llava.evaluation import metrics

vqa_accuracy = evaluate.load(str(Path(metrics.__file__).parent / "vqa_accuracy"))
vqa_accuracy.compute(predictions=["Two dogs."], references=[["2 dogs"] * 10])  # {"vqa_accuracy": 1.0}
```

`evaluate` copies a module to a cache of its own before it imports it, so the modules import what they share from the
installed package, and the whole module `checks`: `evaluate` takes the first metric class in a module's namespace.
"""
