"""GPT-2 small (Radford et al. 2019) on 10 billion tokens, in half-million-token batches.

  python scripts/train.py --config=configs/gpt2_124m.py --config.data.text=corpus/ --workdir=runs/gpt2

:modern is the same with the modern preset (llm_jax/training/presets.py), at half of its tokens; not run.
12 layers, 12 heads, width 768, context 1,024. Expected loss: not known for your text.
Time: 5.4 hours at 515,000 tokens a second, those of this model, unrolled and with contiguous rows, in
configs/sweep_modern_124m.py on one H200; not run whole.
"""

from llm_jax.training.experiment import default_config, override
from llm_jax.training.presets import MODERN


def get_config(arg=""):
    config = default_config(tokenizer="sentencepiece")
    config.steps = 19_070
    config.global_batch_size = 512
    config.accumulation = 0  # by the free memory
    config.steps_per_dispatch = 10
    config.data.text = ("corpus/",)
    config.data.sequence_length = 1024
    config.data.rows = "contiguous"  # as GPT-2 had it; packed rows take a ninth longer (docs/log.md)
    config.data.validation_fraction = 0.005
    config.tokenizer.vocab_size = 50_304
    config.tokenizer.sample_lines = 2_000_000
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.model_dim = 768
    config.model.positions = "learnt"
    config.model.norm = "layernorm"
    config.model.activation = "gelu_tanh"
    config.model.biases = True
    config.model.init_std = 0.02
    config.model.scan_layers = False  # a GPU takes a quarter longer by a scan (docs/log.md)
    config.optimizer.learning_rate = 6e-4
    config.schedule.warmup_steps = 700
    config.schedule.end_ratio = 0.1
    config.evaluation.every = 250
    config.evaluation.batches = 20
    config.evaluation.batch_size = 64
    config.checkpoint.every = 1000
    config.samples.prompt = "The "
    if arg == "modern":
        short = {"steps": config.steps // 20 * 10, "optimizer.learning_rate": 7e-3}
        return override(config, MODERN | short)
    return config
